"""What the values of a configuration must be, beyond their types."""

from __future__ import annotations

import math
from typing import Any

from pcam_jax.config.schema import Config
from pcam_jax.runtime.errors import UserError

_POSITIVE = ("train.epochs", "train.batch_size", "train.eval_batch_size", "train.cpu_devices",
             "train.nan_patience", "checkpoint.keep", "optimizer.accumulate_steps",
             "optimizer.plateau_patience")  # fmt: skip
_ABOVE_ZERO = ("optimizer.peak_lr", "optimizer.epsilon")
_NOT_NEGATIVE = (
    "data.folds", "data.fold", "train.early_stop_patience", "train.early_stop_from_epoch",
    "train.max_seconds", "checkpoint.every_steps", "checkpoint.every_seconds",
    "optimizer.weight_decay", "optimizer.min_lr", "optimizer.clip_norm",
    "optimizer.freeze_epochs", "optimizer.swa_epochs", "optimizer.freeze_lr", "loss.focal_gamma",
    "augment.rotation_degrees", "augment.shear_degrees", "augment.brightness", "augment.hed_jitter",
    "augment.blur_sigma", "augment.noise_sigma", "augment.mixup_alpha", "augment.cutmix_alpha",
    "augment.strong_factor", "train.seed", "data.split_seed",
)  # fmt: skip
_FRACTIONS = (  # in [0, 1)
    "data.validation_fraction", "optimizer.momentum", "optimizer.beta1", "optimizer.beta2",
    "optimizer.ema_decay", "optimizer.warmup_fraction", "loss.label_smoothing", "augment.zoom",
    "augment.shift", "augment.contrast", "augment.saturation",
)  # fmt: skip
_SHARES = ("augment.blur_probability", "augment.erase_probability", "augment.erase_area",
           "optimizer.plateau_factor", "optimizer.layer_decay")  # in [0, 1]  # fmt: skip


def check_config(config: Config) -> None:
    """Check every value that its type alone does not.

    Raises:
        UserError: a value lies outside its range; the message names the key and what is allowed.
    """

    def value_of(name: str) -> Any:
        table, _, key = name.partition(".")
        return getattr(getattr(config, table), key)

    def demand(names: tuple[str, ...], holds: Any, allowed: str) -> None:
        for name in names:
            value = value_of(name)
            if not (math.isfinite(value) and holds(value)):
                raise UserError(f"{name} is {value}: it must be {allowed}.")

    demand(_POSITIVE, lambda value: value >= 1, "a whole number of at least 1")
    demand(_ABOVE_ZERO, lambda value: value > 0, "above 0")
    demand(_NOT_NEGATIVE, lambda value: value >= 0, "0 or more")
    demand(_FRACTIONS, lambda value: 0 <= value < 1, "at least 0 and below 1")
    demand(_SHARES, lambda value: 0 <= value <= 1, "between 0 and 1")
    data, train = config.data, config.train
    if data.train_fraction is not None and not 0 < data.train_fraction <= 1:
        raise UserError(f"data.train_fraction is {data.train_fraction}: it must be above 0 and at most 1.")
    if data.folds and not (data.folds >= 2 and data.fold < data.folds):
        raise UserError(
            f"data.fold is {data.fold} of data.folds {data.folds}: there must be at least 2 folds, "
            "and fold below folds."
        )
    if not data.store:
        raise UserError(
            'data.store is empty: name a folder made by `python -m pcam_jax.prepare`, or "sample".'
        )
    if train.batch_size % config.optimizer.accumulate_steps:
        raise UserError(
            f"train.batch_size is {train.batch_size}: optimizer.accumulate_steps "
            f"({config.optimizer.accumulate_steps}) must divide it."
        )
    _check_averages(config)
    if config.optimizer.min_lr > config.optimizer.peak_lr:
        raise UserError(
            f"optimizer.min_lr is {config.optimizer.min_lr}: it must not exceed optimizer.peak_lr "
            f"({config.optimizer.peak_lr})."
        )


def _check_averages(config: Config) -> None:
    settings, epochs = config.optimizer, config.train.epochs
    if not settings.swa_epochs:
        return
    if settings.name == "schedule_free_adamw":
        raise UserError(
            f"optimizer.swa_epochs is {settings.swa_epochs}: schedule_free_adamw averages at every step, so set it "
            "to 0."
        )
    if settings.swa_epochs + settings.freeze_epochs > epochs:
        raise UserError(
            f"optimizer.swa_epochs is {settings.swa_epochs}: with optimizer.freeze_epochs "
            f"({settings.freeze_epochs}) it must not exceed train.epochs ({epochs})."
        )
