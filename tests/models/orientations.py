"""Images and maps in all orientations, for the tests of equivariant layers and nets."""

from __future__ import annotations

from typing import Any

import numpy as np

from pcam_jax.models import group_layers


def act(images: np.ndarray, element: int) -> np.ndarray:
    """The element acting on [B, H, W, C]."""
    return np.moveaxis(group_layers.act(np.moveaxis(images, 0, -1), element), -1, 0)


def act_on_map(maps: np.ndarray, element: int, elements: int) -> np.ndarray:
    """The element acting on a map over the group: T_h f[h^-1 g]."""
    apart = maps.reshape(*maps.shape[:3], elements, -1)
    moved = [group_layers.compose(group_layers.inverse(element), g) for g in range(elements)]
    return act(apart[:, :, :, moved].reshape(maps.shape), element)


def largest_error(got: Any, expected: np.ndarray) -> float:
    """In units of the expected values' spread."""
    return float(np.abs(np.asarray(got) - expected).max() / expected.std())


def orbit(side: int, elements: int) -> np.ndarray:
    """One image in all orientations, [elements, side, side, 3]."""
    image = np.random.default_rng(1).random((1, side, side, 3)).astype(np.float32)
    return np.concatenate([act(image, h) for h in range(elements)])
