"""Which formulations the layers take: the one place where the models ask about the machine."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from pathlib import Path

import jax

_portable: contextvars.ContextVar[bool] = contextvars.ContextVar("pcam_jax_portable", default=False)


def prefers_cpu_formulations() -> bool:
    """Whether convolutions and pools are traced in the forms that XLA's CPU backend runs fast.

    Read while a function is traced, never while it runs.
    """
    return not _portable.get() and jax.default_backend() == "cpu"


def has_bfloat16_matrix_units() -> bool:
    """Whether the one device is a CPU that multiplies bfloat16 matrices several times as fast as float32 ones.

    AVX-512's bfloat16 instructions alone are too little: there Winograd's float32 form is ahead.
    """
    if not prefers_cpu_formulations():
        return False
    try:
        return " amx_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


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
