"""Stain normalisation of H&E images: every patch redrawn as one reference scanner would have shown it."""

from __future__ import annotations

import numpy as np

# The reference of Macenko et al.: optical densities (R, G, B) of haematoxylin and eosin, and the density that
# one pixel in a hundred exceeds in each stain.
REFERENCE_STAINS = np.array([[0.5626, 0.7201, 0.4062], [0.2159, 0.8012, 0.5581]])
REFERENCE_DENSITY = np.array([1.9705, 1.0308])

_LIGHT = 240.0  # intensity that counts as no stain
_TISSUE_DENSITY = 0.15  # a pixel is tissue if every channel absorbs at least this much
_TISSUE_SHARE = 0.01  # below this share of tissue a patch is blank
_PERCENTILE = 1.0  # robust extremes of the angle, and of the densities
_SMALLEST_ANGLE = np.deg2rad(5)  # stains closer than this are one stain
_LARGEST_GAIN = 3.0  # how much a stain may be amplified or weakened
_DENSITY_OF = -np.log((np.arange(256, dtype=np.float32) + 1) / np.float32(_LIGHT))


def macenko_normalize(images: np.ndarray) -> np.ndarray:
    """Normalise the stains of each image on its own.

    M. Macenko et al., "A method for normalizing histology slides for quantitative analysis", ISBI 2009. The two
    stains of an image are found as the extreme directions of its pixels' optical densities, each pixel is
    unmixed into them, the densities are scaled to a reference, and remixed with reference stains.

    Where the method has nothing to go by, it is kept from inventing: a blank patch is returned unchanged; a
    patch of a single stain is unmixed by the reference stains; and no stain is scaled by more than a factor of
    three, so that a trace of one is not blown up to the full reference.

    Args:
        images: [N, H, W, 3] uint8.

    Returns:
        [N, H, W, 3] uint8.
    """
    normalized = np.empty_like(images)
    for image, out in zip(images, normalized, strict=True):
        out[...] = _normalize(image)
    return normalized


def stain_vectors(densities: np.ndarray) -> np.ndarray | None:
    """Optical densities (R, G, B) of haematoxylin and eosin, [2, 3] of unit length, rows in this order.

    Args:
        densities: [n, 3] optical densities of tissue pixels.

    Returns:
        None if the pixels show one stain only.
    """
    # Stains are directions from the origin, so the plane is that of the second moments, not of the covariance.
    _, axes = np.linalg.eigh(densities.T @ densities)
    main, across = axes[:, 2] * np.sign(axes[:, 2].sum()), axes[:, 1]
    angles = np.arctan2(densities @ across, densities @ main)
    low, high = np.percentile(angles, [_PERCENTILE, 100 - _PERCENTILE])
    if high - low < _SMALLEST_ANGLE:
        return None
    found = np.stack([np.cos(angle) * main + np.sin(angle) * across for angle in (low, high)])
    found = np.maximum(found, 0)  # no stain emits light
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    return found[np.argsort(-found[:, 0])]  # haematoxylin absorbs more red


def _normalize(image: np.ndarray) -> np.ndarray:
    densities = _DENSITY_OF[image].reshape(-1, 3)
    tissue = densities[(densities >= _TISSUE_DENSITY).all(1)]
    if len(tissue) < max(2, _TISSUE_SHARE * len(densities)):
        return image
    stains = stain_vectors(tissue)
    unmix = np.linalg.pinv(REFERENCE_STAINS if stains is None else stains).astype(np.float32)
    amounts = densities @ unmix
    reached = np.percentile(tissue @ unmix, 100 - _PERCENTILE, axis=0)
    gains = REFERENCE_DENSITY / np.maximum(reached, 1e-6)
    remix = np.clip(gains, 1 / _LARGEST_GAIN, _LARGEST_GAIN)[:, None] * REFERENCE_STAINS
    # Inverts _DENSITY_OF, so that an image of the reference's own stains comes back as it was.
    intensities = _LIGHT * np.exp(-(amounts @ remix.astype(np.float32))) - 1
    return np.clip(np.round(intensities), 0, 255).astype(np.uint8).reshape(image.shape)
