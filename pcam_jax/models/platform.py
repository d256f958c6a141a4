"""Which formulations the layers take: the one place where the models ask about the machine."""

from __future__ import annotations

import jax


def prefers_cpu_formulations() -> bool:
    """Whether convolutions and pools are traced in the forms that XLA's CPU backend runs fast.

    Read while a function is traced, never while it runs: a net exported on a CPU machine keeps these forms,
    which are exact on every platform.
    """
    return jax.default_backend() == "cpu"
