"""A fast, exactly resumable trainer for PatchCamelyon and its kin, in pure JAX.

The names below are the public Python interface. They load on first use, so that importing the package costs
nothing and never imports jax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pcam_jax.config.files import config_to_toml, load_config
    from pcam_jax.config.schema import Config
    from pcam_jax.data.convert import prepare_store
    from pcam_jax.data.store import Store, open_store
    from pcam_jax.inference.predictor import Predictor
    from pcam_jax.predict import write_submission
    from pcam_jax.runtime.errors import UserError
    from pcam_jax.train import run_training

_HOMES = {
    "Config": "pcam_jax.config.schema",
    "Predictor": "pcam_jax.inference.predictor",
    "Store": "pcam_jax.data.store",
    "UserError": "pcam_jax.runtime.errors",
    "config_to_toml": "pcam_jax.config.files",
    "load_config": "pcam_jax.config.files",
    "open_store": "pcam_jax.data.store",
    "prepare_store": "pcam_jax.data.convert",
    "run_training": "pcam_jax.train",
    "write_submission": "pcam_jax.predict",
}

__all__ = [
    "Config",
    "Predictor",
    "Store",
    "UserError",
    "__version__",
    "config_to_toml",
    "load_config",
    "open_store",
    "prepare_store",
    "run_training",
    "write_submission",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pcam_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
