"""What a run is, as frozen dataclasses.

The defaults here equal ``configs/default.toml``, so that ``python -m pcam_jax.train`` needs no file.
Each field's docstring, one line, is its help text on the command line and in docs/configuration.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


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
