"""A store by the name a person gives it: a folder, or the embedded sample."""

from __future__ import annotations

import os

from pcam_jax.data.store import Store, open_store

SAMPLE = "sample"
"""Names the embedded synthetic set; write ``./sample`` for a folder of that name."""


def open_named_store(name: str | os.PathLike[str]) -> Store:
    """The store in a folder, or the embedded sample, which is drawn on first use.

    Args:
        name: a folder made by `prepare`, or "sample".

    Raises:
        UserError: there is no store, or it is damaged or of a newer format.
    """
    if os.fspath(name) == SAMPLE:
        from pcam_jax.data.sample import embedded_sample

        return open_store(embedded_sample())
    return open_store(name)
