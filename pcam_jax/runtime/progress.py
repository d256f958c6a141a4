"""Progress bars on a terminal, silence elsewhere."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress(total: int | None, description: str, unit: str, initial: int = 0) -> tqdm[Any]:
    """A bar to ``update(n)``, shown only where standard error is a terminal; use as a context manager.

    Args:
        total: how many units the whole work has, or None if unknown.
        description: what is being done.
        unit: what is counted ("img", "step").
        initial: units done before (a resumed run).
    """
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        unit_scale=True,
        initial=initial,
        disable=not sys.stderr.isatty(),
        dynamic_ncols=True,
        leave=False,
    )
