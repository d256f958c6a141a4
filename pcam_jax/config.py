"""What a run is: frozen dataclasses read from TOML, checked strictly, written back in full.

The defaults here equal ``configs/default.toml``, so that ``python -m pcam_jax.train`` needs no file.
Each field's docstring, one line, is its help text on the command line and in docs/configuration.md.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pcam_jax.runtime.errors import UserError


@dataclass(frozen=True)
class DataConfig:
    """Which examples are used, and where they live."""

    store: str = "sample"
    """Folder made by `prepare`; "sample" is the embedded synthetic set."""
    placement: Literal["auto", "host", "device"] = "auto"
    """Images on the host (memory-mapped) or the device; auto: device if an accelerator has room. Same batches."""
    validation_fraction: float = 0.2
    """Share of the labelled examples held out for validation, between 0 and 1."""
    train_fraction: float | None = None
    """Share of the labelled examples trained on; without it, all that validation leaves."""
    split_seed: int = 0
    """Seed of the split between train and validation."""
    split_by: Literal["group", "example"] = "group"
    """Keep each group (slide, patient) on one side where groups exist; "example" overstates grouped data."""
    split_file: str = ""
    """CSV with columns id,split that fixes the split instead."""
    folds: int = 0
    """Number of cross-validation folds; 0 means a single split by validation_fraction."""
    fold: int = 0
    """Which fold validates, from 0."""
    sampling: Literal["natural", "balanced"] = "natural"
    """Draw training examples as they come, or each class equally often."""
    undersample: bool = False
    """Train on as many examples of each class as the rarest has, chosen by split_seed; validation stays whole."""


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    name: str = "resnet_small"
    """Name in the registry; `python -m pcam_jax.train --help` lists them."""
    head: Literal["sigmoid", "softmax"] = "sigmoid"
    """One sigmoid unit (two classes only), or one softmax unit for each class."""
    normalization: Literal["unit", "imagenet"] = "unit"
    """Pixel scaling: to [0, 1], or by ImageNet's channel means and deviations."""
    options: dict[str, int | float | bool | str] = field(default_factory=dict)
    """Options of the chosen network, like `{ dropout = 0.3 }`; on the command line `dropout 0.3`."""
    init_from: str = ""
    """Weights to start from: a .safetensors or .pth file, `hf:<repository>`, or a run folder."""


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes to training images, made on the device; all off by default."""

    horizontal_flip: bool = False
    """Mirror left and right with probability one half."""
    vertical_flip: bool = False
    """Mirror top and bottom with probability one half."""
    d4: bool = False
    """One of the eight symmetries of the square, uniformly."""
    rotation_degrees: float = 0.0
    """Rotate by an angle drawn uniformly within plus or minus this many degrees."""
    zoom: float = 0.0
    """Scale each axis by a factor drawn uniformly from 1 - zoom to 1 + zoom."""
    shear_degrees: float = 0.0
    """Shear by an angle drawn uniformly within plus or minus this many degrees."""
    shift: float = 0.0
    """Move along each axis by up to this share of the side."""
    fill: Literal["reflect", "nearest"] = "reflect"
    """What appears beyond the border: the mirrored image, or its edge repeated."""
    brightness: float = 0.0
    """Add up to plus or minus this much to all pixels (1 is the full range)."""
    contrast: float = 0.0
    """Scale the difference from the image's mean by a factor from 1 - contrast to 1 + contrast."""
    saturation: float = 0.0
    """Scale the difference from grey by a factor from 1 - saturation to 1 + saturation."""
    hed_jitter: float = 0.0
    """Scale and shift haematoxylin, eosin and residual densities by up to this share."""
    blur_sigma: float = 0.0
    """Largest standard deviation of a Gaussian blur, in pixels."""
    blur_probability: float = 0.5
    """Share of images blurred, where blur_sigma is above 0."""
    noise_sigma: float = 0.0
    """Largest standard deviation of Gaussian noise (1 is the full range)."""
    mixup_alpha: float = 0.0
    """Mix pairs of images and labels by a weight from Beta(alpha, alpha)."""
    cutmix_alpha: float = 0.0
    """Paste a rectangle from another image, its area from Beta(alpha, alpha), and mix labels likewise."""
    erase_probability: float = 0.0
    """Share of images in which a random rectangle is replaced by the image's mean colour."""
    erase_area: float = 0.1
    """Largest share of the image erased."""
    strong_class: int = -1
    """A class whose images are changed more strongly; -1 for none."""
    strong_factor: float = 1.5
    """How much more strongly."""


@dataclass(frozen=True)
class LossConfig:
    """What is minimised."""

    name: Literal["cross_entropy", "focal"] = "cross_entropy"
    """(Binary) cross-entropy, or the focal loss of Lin et al. 2017 (arXiv:1708.02002)."""
    focal_gamma: float = 2.0
    """Focusing exponent of the focal loss."""
    label_smoothing: float = 0.0
    """Move this much of the target's mass to the uniform distribution."""
    class_weights: Literal["none", "balanced"] = "none"
    """Weigh each class alike, or by the inverse of its frequency in training."""


@dataclass(frozen=True)
class OptimizerConfig:
    """How parameters follow gradients."""

    name: Literal["adam", "adamw", "sgd", "rmsprop", "muon", "schedule_free_adamw"] = "adam"
    """The update rule."""
    peak_lr: float = 1e-3
    """Highest learning rate of the schedule."""
    schedule: Literal["constant", "cosine", "one_cycle", "plateau"] = "cosine"
    """constant; cosine decay after warm-up; one-cycle; or constant, halved when validation stalls."""
    warmup_fraction: float = 0.0
    """Share of all steps over which cosine and one_cycle rise to peak_lr (one_cycle: 0.3 where this is 0)."""
    min_lr: float = 0.0
    """Floor of every schedule."""
    plateau_factor: float = 0.5
    """What a plateau multiplies the learning rate by."""
    plateau_patience: int = 3
    """Epochs without improvement that make a plateau."""
    plateau_metric: Literal["validation_loss", "validation_auroc", "train_accuracy"] = "validation_loss"
    """What must improve for the plateau schedule."""
    weight_decay: float = 0.0
    """Decoupled weight decay for adamw, muon and schedule_free_adamw, L2 otherwise; never on biases or BN."""
    momentum: float = 0.0
    """Momentum of sgd and rmsprop."""
    nesterov: bool = False
    """Nesterov's momentum for sgd."""
    beta1: float = 0.9
    """Decay of the first moment (Adam family)."""
    beta2: float = 0.999
    """Decay of the second moment (Adam family)."""
    epsilon: float = 1e-7
    """Added to the root of the second moment."""
    clip_norm: float = 0.0
    """Scale gradients down to this global norm; 0 is off."""
    accumulate_steps: int = 1
    """Split each batch into this many parts whose gradients are averaged before the update."""
    ema_decay: float = 0.0
    """Decay of an exponential moving average of the weights, used for evaluation; 0 is off."""
    swa_epochs: int = 0
    """Average the weights at the ends of this many last epochs, with BN statistics of their own; 0 is off."""
    freeze_epochs: int = 0
    """Epochs during which only the head is trained, the body frozen with its BN statistics."""
    freeze_lr: float = 0.0
    """Peak learning rate of those epochs; 0 means peak_lr."""
    layer_decay: float = 1.0
    """Each stage below the head learns at this factor of the next one's rate."""


@dataclass(frozen=True)
class TrainConfig:
    """How long, how large, how exact."""

    epochs: int = 4
    """Passes over the training examples."""
    batch_size: int = 32
    """Examples in a step, over all devices and processes."""
    eval_batch_size: int = 256
    """Examples at once in evaluation."""
    seed: int = 0
    """Seed of initialisation, order, augmentation and dropout."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the network; parameters and losses stay float32."""
    monitor: Literal["validation_loss", "validation_auroc", "validation_accuracy"] = "validation_loss"
    """What decides the best checkpoint and early stopping."""
    early_stop_patience: int = 0
    """Stop after this many epochs without improvement of the monitored figure; 0 never stops early."""
    early_stop_from_epoch: int = 0
    """Epochs at the start that early stopping does not count (Keras calls it start_from_epoch)."""
    nan_patience: int = 20
    """Stop after this many steps in a row with a non-finite loss or gradient (each is skipped)."""
    deterministic: bool = False
    """Ask accelerators for deterministic kernels, at some cost, so that a resumed run repeats bit for bit."""
    cpu_devices: int = 1
    """Devices that a CPU counts as, which share each batch; 2 trains some small networks faster."""
    max_seconds: float = 0.0
    """End training after this many seconds, at the end of an epoch; 0 is no limit."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What is saved, and when, beside the end of each epoch."""

    every_steps: int = 0
    """Also save every so many steps; 0 is off."""
    every_seconds: float = 300.0
    """Also save when so many seconds have passed since the last save; 0 is off."""
    keep: int = 2
    """Latest checkpoints kept, beside the best."""


@dataclass(frozen=True)
class TrackingConfig:
    """Where figures go beside history.csv."""

    tensorboard: bool = True
    """Write TensorBoard events into the run."""
    wandb: bool = False
    """Log to Weights & Biases (extra `wandb`); honours its own WANDB_ environment variables."""
    wandb_project: str = "pcam-jax"
    """Project there."""


@dataclass(frozen=True)
class Config:
    """Everything that decides a run."""

    data: DataConfig = DataConfig()
    model: ModelConfig = field(default_factory=ModelConfig)
    augment: AugmentConfig = AugmentConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()


def load_config(path: str | Path | None = None, overrides: dict[str, Any] | None = None) -> Config:
    """Read a configuration, strictly.

    Args:
        path: a TOML file; None gives the defaults.
        overrides: values by dotted name (``{"train.epochs": 3}``), applied last.

    Raises:
        UserError: the file is missing or not TOML; a key or table is unknown (the nearest name is given); a
            value has the wrong type or lies outside its range.
    """
    tables: dict[str, Any] = {}
    where = "overrides"
    if path is not None:
        where = str(path)
        tables = _read_toml(Path(path))
    for dotted, value in (overrides or {}).items():
        table, _, key = dotted.partition(".")
        if not key:
            raise UserError(f"override {dotted!r} names no table: write it as table.key, like train.epochs.")
        tables.setdefault(table, {})[key] = value
    return config_from_dict(tables, where)


def config_from_dict(tables: dict[str, Any], where: str = "config") -> Config:
    """Build and check a configuration from nested dictionaries, as TOML gives them.

    Raises:
        UserError: as `load_config`.
    """
    config: Config = _build(Config, tables, where, "")
    check_config(config)
    return config


def config_to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """The configuration as nested dictionaries; fields that are None are left out, as TOML has no null."""
    return {
        table: {key: value for key, value in values.items() if value is not None}
        for table, values in dataclasses.asdict(config).items()
    }


def config_to_toml(config: Config) -> str:
    """The whole configuration as TOML that `load_config` reads back to an equal one."""
    lines: list[str] = []
    for table, values in config_to_dict(config).items():
        lines.append(f"[{table}]")
        lines += [f"{key} = {_toml_value(value)}" for key, value in values.items()]
        lines.append("")
    return "\n".join(lines)


def changed_settings(before: Config, after: Config) -> list[str]:
    """Dotted names, with both values, of the settings in which two configurations differ."""
    old, new = dataclasses.asdict(before), dataclasses.asdict(after)
    return [
        f"{table}.{key} ({old[table][key]!r} -> {new[table][key]!r})"
        for table in old
        for key in old[table]
        if old[table][key] != new[table][key]
    ]


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


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise UserError(f"There is no config file {path}: check the path, or leave it out.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder: a config is a .toml file.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}.") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply for a config.") from None


def _build(kind: type, values: Any, where: str, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise UserError(f"{prefix.rstrip('.')} in {where} must be a table: write [{prefix.rstrip('.')}].")
    hints = typing.get_type_hints(kind)
    built: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            what = "key" if prefix else "table"
            raise UserError(f"Unknown {what} {prefix + key!r} in {where}{_nearest(key, prefix, hints)}.")
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            built[key] = _build(typing.cast(type, hint), value, where, f"{prefix}{key}.")
        else:
            built[key] = _checked(hint, value, f"{prefix}{key}", where)
    return kind(**built)


def _nearest(key: str, prefix: str, hints: dict[str, Any]) -> str:
    close = difflib.get_close_matches(key, hints, n=1, cutoff=0.5)
    if close:
        return f": did you mean {prefix + close[0]!r}"
    return f": known are {', '.join(hints)}"


def _checked(hint: Any, value: Any, name: str, where: str) -> Any:
    """``value`` if it fits the annotation ``hint`` (whole numbers pass as floats), else a UserError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value in arguments:
            return value
        raise UserError(
            f"{name} in {where} is {value!r}: it must be one of {', '.join(map(repr, arguments))}."
        )
    if origin is types.UnionType:
        if value is None and type(None) in arguments:
            return None
        hint = next(argument for argument in arguments if argument is not type(None))
        return _checked(hint, value, name, where)
    if origin is dict:
        if isinstance(value, dict) and all(isinstance(item, (int, float, str)) for item in value.values()):
            return value
        raise UserError(f"{name} in {where} must be a table of plain values, like {{ dropout = 0.3 }}.")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{name} in {where} is {value!r}: it must be of type {hint.__name__}.")
    return value


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _toml_string(value)
    if isinstance(value, dict):
        inner = ", ".join(f"{_toml_string(key)} = {_toml_value(item)}" for key, item in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    return repr(value)


def _toml_string(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped) + '"'
