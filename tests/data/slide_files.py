"""A picture like a slide, and pyramids of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tifffile
from PIL import Image


def scene(height: int, width: int) -> np.ndarray:
    """A smooth pink and violet picture with fine noise."""
    down, across = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).integers(0, 9, (height, width, 1))
    waves = [np.sin(down / 17), np.cos(across / 23), np.sin((down + across) / 31)]
    base = np.array([190.0, 120, 180])
    return (base + 40 * np.stack(waves, -1) + noise).astype(np.uint8)


def write_pyramid(
    path: Path, picture: np.ndarray, levels: int = 3, microns: float | None = 0.243, **options: object
) -> Path:
    """A tiled pyramid as scanners write it: levels in subfiles, halved each time."""
    resolution = (
        {} if microns is None else {"resolution": (1e4 / microns,) * 2, "resolutionunit": "CENTIMETER"}
    )
    options = {"tile": (64, 48), "photometric": "rgb", **resolution, **options}
    with tifffile.TiffWriter(path) as file:
        file.write(picture, subifds=levels - 1, **options)
        for level in range(1, levels):
            small = np.asarray(Image.fromarray(picture).reduce(2**level))
            file.write(small, subfiletype=1, **{**options, "resolution": None, "resolutionunit": None})
    return path


PICTURE = scene(205, 301)
