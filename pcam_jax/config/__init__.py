"""What a run is: settings, what they may be, and their files."""

from pcam_jax.config.files import (
    changed_settings,
    config_from_dict,
    config_to_dict,
    config_to_toml,
    load_config,
)
from pcam_jax.config.rules import check_config
from pcam_jax.config.schema import (
    AugmentConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    TrackingConfig,
    TrainConfig,
)

__all__ = [
    "AugmentConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "TrackingConfig",
    "TrainConfig",
    "changed_settings",
    "check_config",
    "config_from_dict",
    "config_to_dict",
    "config_to_toml",
    "load_config",
]
