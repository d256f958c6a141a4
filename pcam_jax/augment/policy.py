"""From the `[augment]` table to one function of (key, images, labels)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import random

from pcam_jax.augment import color, geometry, mix
from pcam_jax.augment.fusion import materialize
from pcam_jax.config.schema import AugmentConfig
from pcam_jax.runtime.errors import UserError

# (key, images float32 [B, H, W, 3] in [0, 1], labels int32 [B]) -> (images, targets)
Augment = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]

Strength = jax.Array | float
Stage = Callable[[jax.Array, jax.Array, Strength], jax.Array]  # (keys, images, strength) -> images

# Each operation has a key of its own: turning one on leaves the others' draws as they were.
_SYMMETRY, _AFFINE, _STAIN, _COLOR, _BLUR, _NOISE, _ERASE, _PARTNERS, _MIXUP, _CUTMIX, _CHOICE = range(11)


def mixes_labels(config: AugmentConfig) -> bool:
    """Whether targets are class probabilities [B, classes] float32 instead of labels [B] int32."""
    return config.mixup_alpha > 0 or config.cutmix_alpha > 0


def changes_anything(config: AugmentConfig) -> bool:
    """Whether any operation is on."""
    return bool(_stages(config)) or mixes_labels(config)


def make_augment(config: AugmentConfig, classes: int = 2) -> Augment:
    """Build the augmentation that a configuration describes.

    What is off costs nothing: it is absent from the compiled program. The order is symmetries and affine map
    (one gather), stain, colour, blur, noise, erasing, mixing. But for mixing, image i's result depends on
    nothing but key, i, image i and, for a strongly changed class, its label. Where both mixup and cutmix are
    on, each example gets one of them, evenly.

    Args:
        config: the `[augment]` table.
        classes: number of classes, for mixed targets; two for a one-unit head.

    Returns:
        A pure function, fit for jit, of (key, images float32 [B, H, W, 3] in [0, 1], labels int32 [B]) to
        (images likewise, targets). Targets are the labels themselves or, where `mixes_labels(config)`, class
        probabilities float32 [B, classes] whose rows sum to 1: the cross-entropy against them is
        ``-sum(targets * log_probs, -1)``, and for a one-unit head targets[:, 1] is the soft label.

    Raises:
        UserError: there is no class strong_class, strong_factor takes a range beyond what it can be, or (when
            called) d4 meets images that are not square.
    """
    _check(config, classes)
    stages = _stages(config)
    mixing = mixes_labels(config)

    def augment(key: jax.Array, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        # One split for all: each further call of the generator adds a tenth of a second of compilation.
        keys = random.split(key, _CHOICE + 1)
        strength = _strength(config, labels)
        for i, stage in enumerate(stages):
            images = stage(keys, materialize(key, images) if i else images, strength)
        if not mixing:
            return images, labels
        images = materialize(key, images) if stages else images
        partners = mix.draw_partners(keys[_PARTNERS], images.shape[0])
        images, lam = _mix(config, keys, images, partners)
        return images, mix.mix_targets(labels, partners, lam, classes)

    return augment


def _check(config: AugmentConfig, classes: int) -> None:
    if config.strong_class >= classes:
        raise UserError(
            f"augment.strong_class is {config.strong_class}, and the classes are 0 to {classes - 1}: name one "
            "of them, or -1 for none."
        )
    factor = config.strong_factor if config.strong_class >= 0 else 1.0
    for name in ("zoom", "contrast", "saturation"):
        reach = getattr(config, name) * max(factor, 1.0)
        if reach >= 1:
            raise UserError(
                f"augment.{name} times augment.strong_factor is {reach:g}: it must be below 1, or pictures "
                "would collapse or turn inside out; lower one of them."
            )


def _strength(config: AugmentConfig, labels: jax.Array) -> Strength:
    if config.strong_class < 0 or config.strong_factor == 1:
        return 1.0
    return jnp.where(labels == config.strong_class, config.strong_factor, 1.0).astype(jnp.float32)


def _stages(config: AugmentConfig) -> list[Stage]:
    """What changes images one by one, in order, leaving out what is off."""
    wanted: list[tuple[bool | float, Callable[..., jax.Array]]] = [
        (config.d4 or config.horizontal_flip or config.vertical_flip or _moves(config), _place),
        (config.hed_jitter, _stain),
        (config.brightness or config.contrast or config.saturation, _color),
        (config.blur_sigma and config.blur_probability, _blur),
        (config.noise_sigma, _noise),
        (config.erase_probability and config.erase_area, _erase),
    ]
    return [functools.partial(stage, config) for on, stage in wanted if on]


def _moves(config: AugmentConfig) -> bool:
    return any((config.rotation_degrees, config.zoom, config.shear_degrees, config.shift))


def _place(config: AugmentConfig, keys: jax.Array, images: jax.Array, strength: Strength) -> jax.Array:
    bits = None
    if config.d4 and images.shape[1] != images.shape[2]:
        raise UserError(
            f"augment.d4 needs square images and these are {images.shape[1]}x{images.shape[2]}: "
            "use augment.horizontal_flip and augment.vertical_flip."
        )
    if config.d4 or config.horizontal_flip or config.vertical_flip:
        bits = geometry.symmetry_bits(
            keys[_SYMMETRY], images.shape[0], vertical=config.d4 or config.vertical_flip,
            horizontal=config.d4 or config.horizontal_flip, transpose=config.d4,
        )  # fmt: skip
    if _moves(config):
        return geometry.affine(
            keys[_AFFINE], images, rotation_degrees=config.rotation_degrees, zoom=config.zoom,
            shear_degrees=config.shear_degrees, shift=config.shift, fill=config.fill, symmetries=bits,
            strength=strength,
        )  # fmt: skip
    return images if bits is None else geometry.apply_symmetry(images, bits)


def _stain(config: AugmentConfig, keys: jax.Array, images: jax.Array, strength: Strength) -> jax.Array:
    return color.hed_jitter(keys[_STAIN], images, amount=config.hed_jitter, strength=strength)


def _color(config: AugmentConfig, keys: jax.Array, images: jax.Array, strength: Strength) -> jax.Array:
    return color.brightness_contrast_saturation(
        keys[_COLOR], images, brightness=config.brightness, contrast=config.contrast,
        saturation=config.saturation, strength=strength,
    )  # fmt: skip


def _blur(config: AugmentConfig, keys: jax.Array, images: jax.Array, strength: Strength) -> jax.Array:
    factor = max(config.strong_factor, 1.0) if config.strong_class >= 0 else 1.0
    return color.gaussian_blur(
        keys[_BLUR], images, sigma=config.blur_sigma, probability=config.blur_probability,
        strength=strength, radius=color.blur_radius(config.blur_sigma * factor),
    )  # fmt: skip


def _noise(config: AugmentConfig, keys: jax.Array, images: jax.Array, strength: Strength) -> jax.Array:
    return color.gaussian_noise(keys[_NOISE], images, sigma=config.noise_sigma, strength=strength)


def _erase(config: AugmentConfig, keys: jax.Array, images: jax.Array, strength: Strength) -> jax.Array:
    return mix.random_erasing(
        keys[_ERASE], images, probability=config.erase_probability, area=config.erase_area, strength=strength
    )


def _mix(
    config: AugmentConfig, keys: jax.Array, images: jax.Array, partners: jax.Array
) -> tuple[jax.Array, jax.Array]:
    if not config.cutmix_alpha:
        return mix.mixup(keys[_MIXUP], images, partners, alpha=config.mixup_alpha)
    pasted, kept = mix.cutmix(keys[_CUTMIX], images, partners, alpha=config.cutmix_alpha)
    if not config.mixup_alpha:
        return pasted, kept
    blended, lam = mix.mixup(keys[_MIXUP], images, partners, alpha=config.mixup_alpha)
    paste = random.bernoulli(keys[_CHOICE], 0.5, lam.shape)
    return jnp.where(paste[:, None, None, None], pasted, blended), jnp.where(paste, kept, lam)
