"""What can be measured in every image: brightness, spread, stain, saturation, and a key that no turning changes.

One pass over the store, in batches of about 32 MiB. The stains are separated as by Ruifrok & Johnston 2001,
"Quantification of histochemical staining by color deconvolution": optical densities are sums over stains, so an
image's mean density gives its mean amount of each stain.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from pcam_jax.data.loader import ImageSource
from pcam_jax.runtime.progress import progress

FloatArray = npt.NDArray[np.float64]

BLANK_SPREAD = 3.0
"""Standard deviation of the grey value, of 255, below which an image shows nothing."""
SATURATED_SHARE = 0.5
"""Share of pixels with a channel at 0 or 255 above which an image counts as saturated."""
# optical densities (R, G, B) of haematoxylin, eosin and the rest, rows of unit length
_STAINS = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]])
_UNMIX = np.linalg.inv(_STAINS / np.linalg.norm(_STAINS, axis=1, keepdims=True))
_DENSITY_OF = -np.log10((np.arange(256) + 1) / 256).astype(np.float32)
_BATCH_BYTES = 32 * 2**20


class Stop(Protocol):
    """Something to ask between batches whether to stop."""

    def check(self) -> None:
        """Raise if so."""


@dataclass(frozen=True)
class PixelStatistics:
    """Measures of N images.

    Attributes:
        brightness: `[N]` mean grey value, 0 to 255.
        spread: `[N]` standard deviation of the grey value.
        haematoxylin: `[N]` mean amount of the stain, in optical density.
        eosin: `[N]` likewise.
        saturated: `[N]` share of pixels with a channel at 0 or 255.
        channel_sums: `[N, 3] int64` over the pixels of each image.
        keys: `[N, 9] int64`, sums, squares and products of the channels: equal for an image and its eight
            symmetries, and practically never else.
        pixels: number of pixels of an image.
    """

    brightness: FloatArray
    spread: FloatArray
    haematoxylin: FloatArray
    eosin: FloatArray
    saturated: FloatArray
    channel_sums: npt.NDArray[np.int64]
    keys: npt.NDArray[np.int64]
    pixels: int

    @property
    def blank(self) -> npt.NDArray[np.bool_]:
        """`[N]`: shows nothing."""
        return self.spread < BLANK_SPREAD

    @property
    def burnt(self) -> npt.NDArray[np.bool_]:
        """`[N]`: mostly saturated, and not blank."""
        return (self.saturated > SATURATED_SHARE) & ~self.blank

    def channel_mean(self, chosen: npt.ArrayLike) -> FloatArray:
        """Mean of each channel over the pixels of the chosen images, `[3]`, of 255."""
        sums = self.channel_sums[np.asarray(chosen)]
        return sums.sum(axis=0) / (len(sums) * self.pixels)

    def channel_std(self, chosen: npt.ArrayLike) -> FloatArray:
        """Standard deviation of each channel over the pixels of the chosen images, `[3]`, of 255."""
        squares = self.keys[np.asarray(chosen)][:, 3:6]
        return np.sqrt(squares.sum(axis=0) / (len(squares) * self.pixels) - self.channel_mean(chosen) ** 2)


def measure_pixels(source: ImageSource, count: int, stop: Stop | None = None) -> PixelStatistics:
    """Measure the first ``count`` images of a source.

    Args:
        source: a store, or anything that gathers like one.
        count: how many images it holds.
        stop: asked between batches.
    """
    height, width, _ = source.image_shape
    pixels = height * width
    moments = np.empty((count, 9), np.int64)
    densities = np.empty((count, 3))
    saturated = np.empty(count)
    batch = max(1, _BATCH_BYTES // (pixels * 3))
    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as threads, progress(count, "measure", "img") as bar:
        for start in range(0, count, batch):
            if stop is not None:
                stop.check()
            rows = np.arange(start, min(start + batch, count))
            images = source.gather(rows).reshape(len(rows), pixels, 3)
            # numpy lets go of the interpreter while it computes, so threads share the work
            parts = np.array_split(np.arange(len(rows)), min(len(rows), workers))
            for part in threads.map(lambda at: _measure(images[at[0] : at[-1] + 1], rows[at]), parts):  # noqa: B023
                moments[part.rows], densities[part.rows] = part.moments, part.densities
                saturated[part.rows] = part.saturated
            bar.update(len(rows))
    sums, squares, products = (moments[:, part] for part in (slice(0, 3), slice(3, 6), slice(6, 9)))
    grey = sums.sum(axis=1) / (3 * pixels)
    grey_square = (squares.sum(axis=1) + 2 * products.sum(axis=1)) / (9 * pixels)
    stains = densities @ _UNMIX
    return PixelStatistics(
        brightness=grey,
        spread=np.sqrt(np.maximum(grey_square - grey**2, 0)),
        haematoxylin=stains[:, 0],
        eosin=stains[:, 1],
        saturated=saturated,
        channel_sums=sums,
        keys=moments,
        pixels=pixels,
    )


class _Part(NamedTuple):
    """Measures of a few images."""

    rows: npt.NDArray[np.int64]
    moments: npt.NDArray[np.int64]
    densities: FloatArray
    saturated: FloatArray


def _measure(images: npt.NDArray[np.uint8], rows: npt.NDArray[np.int64]) -> _Part:
    """Measure ``images [n, pixels, 3]``, which stand at ``rows [n]``."""
    part = _Part(rows, np.empty((len(rows), 9), np.int64), np.empty((len(rows), 3)), np.empty(len(rows)))
    for row, image in enumerate(images):
        values = image.astype(np.float64)  # sums of squares stay exact below 2 ** 53
        gram = values.T @ values
        part.moments[row, :3] = values.sum(axis=0)
        part.moments[row, 3:6] = np.diagonal(gram)
        part.moments[row, 6:] = gram[0, 1], gram[1, 2], gram[0, 2]
        part.densities[row] = _DENSITY_OF[image].mean(axis=0, dtype=np.float64)
        part.saturated[row] = ((image == 255) | (image == 0)).any(axis=1).mean()
    return part
