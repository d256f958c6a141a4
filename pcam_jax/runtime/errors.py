"""The errors a person sees: one sentence saying what is wrong, where, and what to do."""

from __future__ import annotations

import importlib
from types import ModuleType


class UserError(Exception):
    """A mistake in the input, reported as its one sentence with exit code 2 and no traceback."""


class Interrupted(Exception):
    """A SIGINT or SIGTERM was honoured after the work so far was saved.

    Args:
        signum: number of the signal; the exit code is 128 + signum (130 or 143).
        message: what was saved and how to go on.
    """

    def __init__(self, signum: int, message: str = "") -> None:
        super().__init__(message)
        self.signum = signum


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package, or say which extra brings it.

    Raises:
        UserError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"This needs the package {module!r}, which is not installed: pip install 'pcam-jax[{extra}]'."
        ) from error
