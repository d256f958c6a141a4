"""What augmentation does to real images, as a picture to look at before training."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from pcam_jax.augment.policy import Augment, changes_anything, make_augment
from pcam_jax.config.schema import AugmentConfig

# Column title -> the fields that belong to it. A probability is shown as if it were 1.
_OPERATIONS: dict[str, tuple[str, ...]] = {
    "symmetry": ("horizontal_flip", "vertical_flip", "d4"),
    "affine": ("rotation_degrees", "zoom", "shear_degrees", "shift", "fill"),
    "stain": ("hed_jitter",),
    "colour": ("brightness", "contrast", "saturation"),
    "blur": ("blur_sigma", "blur_probability"),
    "noise": ("noise_sigma",),
    "erasing": ("erase_probability", "erase_area"),
    "mixup": ("mixup_alpha",),
    "cutmix": ("cutmix_alpha",),
}


def augmentation_sheet(
    images: np.ndarray,
    config: AugmentConfig,
    key: jax.Array,
    labels: np.ndarray | None = None,
    draws: int = 4,
) -> Figure:
    """Draw each image as it is, after each operation that is on alone, and after all of them, several times.

    Args:
        images: [N, H, W, 3] uint8, one row each; eight is a good number.
        config: the `[augment]` table.
        key: random key; the same key gives the same sheet.
        labels: [N] int, for a strongly changed class; without them no image counts as of that class.
        draws: columns of all operations together.
    """
    shown = np.asarray(images)
    classes = jnp.asarray(np.full(len(shown), -1) if labels is None else labels, jnp.int32)
    scaled = jnp.asarray(shown.astype(np.float32) / 255)
    columns = {"original": shown}
    for title, single in _single_operations(config).items():
        columns[title] = _augmented(_compiled(single), key, scaled, classes)
    augment = _compiled(config)
    for i in range(draws):
        columns[f"all, draw {i + 1}"] = _augmented(augment, jax.random.fold_in(key, i), scaled, classes)
    figure = Figure(
        figsize=(1.15 * len(columns), 1.15 * len(shown) + 0.3), layout="constrained", facecolor="white"
    )
    grid = figure.subplots(len(shown), len(columns), squeeze=False)
    for column, (title, pictures) in enumerate(columns.items()):
        grid[0, column].set_title(title, fontsize=9)
        for row, picture in enumerate(pictures):
            axes = grid[row, column]
            axes.imshow(picture, interpolation="nearest")
            axes.set_axis_off()
    return figure


def _single_operations(config: AugmentConfig) -> dict[str, AugmentConfig]:
    """For each operation that is on, a configuration with it alone."""
    singles = {}
    for title, fields in _OPERATIONS.items():
        wanted: dict[str, Any] = {
            field: getattr(config, field) for field in (*fields, "strong_class", "strong_factor")
        }
        single = dataclasses.replace(AugmentConfig(), **wanted)
        if changes_anything(single):
            certain: dict[str, Any] = {"blur_probability": 1.0}
            if title == "erasing":
                certain["erase_probability"] = 1.0
            singles[title] = dataclasses.replace(single, **certain)
    return singles


def _compiled(config: AugmentConfig) -> Augment:
    return jax.jit(
        make_augment(config, classes=max(2, config.strong_class + 1))
    )  # mixed labels are not shown


def _augmented(augment: Augment, key: jax.Array, images: jax.Array, labels: jax.Array) -> np.ndarray:
    """[N, H, W, 3] uint8."""
    changed, _ = augment(key, images, labels)
    return np.round(np.asarray(changed) * 255).astype(np.uint8)
