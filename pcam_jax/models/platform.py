"""Which formulations the layers take: the one place where the models ask about the machine."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_portable: contextvars.ContextVar[bool] = contextvars.ContextVar("pcam_jax_portable", default=False)


def prefers_cpu_formulations() -> bool:
    """Whether convolutions and pools are traced in the forms that XLA's CPU backend runs fast.

    Read while a function is traced, never while it runs.
    """
    return not _portable.get() and jax.default_backend() == "cpu"


@contextlib.contextmanager
def portable_formulations() -> Iterator[None]:
    """What is traced inside takes the plain forms whatever the machine: for graphs that leave it.

    They are small, know no fixed batch size, and other runtimes have fast kernels of their own for them.
    """
    token = _portable.set(True)
    try:
        yield
    finally:
        _portable.reset(token)
