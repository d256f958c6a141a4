"""Big pictures: a probability for every square of a slide.

A network's label may speak of a part of its image only: PatchCamelyon's says whether the central 32x32 of 96x96
pixels hold tumour. So each probability belongs to the central square of its window, windows lie one such square apart
unless told otherwise, and the picture is continued at its border as in a mirror. Networks of other image sizes answer
for their whole image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from pcam_jax.data.background import boxes_with_tissue, tissue_mask
from pcam_jax.data.slide_view import SlideView
from pcam_jax.data.whole_slide import ArraySlide, Slide
from pcam_jax.inference.averaging import mean_probabilities
from pcam_jax.inference.predictor import Predictor
from pcam_jax.inference.saliency import central_side
from pcam_jax.runtime.errors import UserError
from pcam_jax.runtime.signals import Stop

Blend = Literal["mean", "smooth", "nearest"]

PCAM_MICRONS = 0.972
"""Micrometres a pixel of PatchCamelyon's patches: level 2 of Camelyon16's slides of 0.243."""
_REGION_SIDE = 1024  # pixels that are read at once: 3 MB
_MOST_TILES = 50_000_000


@dataclasses.dataclass(frozen=True)
class TileGrid:
    """Tiles laid over a picture: tile (i, j) answers for the square whose corner is (i, j) * stride.

    Lengths are in pixels of the view, pairs are (down, across).
    """

    size: tuple[int, int]
    """Of the picture."""
    window: tuple[int, int]
    """What the network sees."""
    side: tuple[int, int]
    """The middle of the window, for which it answers."""
    stride: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of tiles that cover the picture."""
        rows, columns = (
            max(0, -(-(length - max(side, step)) // step)) + 1
            for length, side, step in zip(self.size, self.side, self.stride, strict=True)
        )
        return rows, columns

    @property
    def unit(self) -> tuple[int, int]:
        """Size of a map's cell: the stride, or the square where those lie apart."""
        down, across = (min(side, step) for side, step in zip(self.side, self.stride, strict=True))
        return down, across

    def windows(self, tiles: np.ndarray) -> np.ndarray:
        """Corners of the windows of tiles ``[n, 2] int64``, likewise; negative near the border."""
        margin = np.subtract(self.window, self.side) // 2
        return np.asarray(tiles * np.array(self.stride) - margin)


@dataclasses.dataclass(frozen=True)
class TileMap:
    """Probabilities of the tiles of a picture.

    Attributes:
        grid: how the tiles lie.
        scale: pixels of the full resolution along one of the view.
        tiles: ``[n, 2] int64`` (row, column) of those that were looked at, the others being glass.
        probs: ``[n]`` of class 1, or ``[n, K] float32``.
    """

    grid: TileGrid
    scale: float
    tiles: np.ndarray
    probs: np.ndarray

    @property
    def scores(self) -> np.ndarray:
        """One number a tile, ``[n] float32``: of class 1, or of all classes but the first where there are several."""
        return self.probs if self.probs.ndim == 1 else np.asarray(1 - self.probs[:, 0], np.float32)

    def corners(self) -> np.ndarray:
        """Corners of the tiles' squares in pixels of the full resolution, ``[n, 2] float64`` (down, across)."""
        return self.tiles * np.array(self.grid.stride) * self.scale

    def image(self, blend: Blend = "mean") -> np.ndarray:
        """The map, ``[rows, columns] float32``, a value for each cell of ``grid.unit`` pixels, NaN where none is.

        Args:
            blend: where squares overlap: ``mean`` of all that cover a cell, ``smooth`` (weights that fall towards
                the edge of a square), or the ``nearest`` alone.
        """
        steps = [step // unit for step, unit in zip(self.grid.stride, self.grid.unit, strict=True)]
        spans = [side // unit for side, unit in zip(self.grid.side, self.grid.unit, strict=True)]
        wanted = [-(-length // unit) for length, unit in zip(self.grid.size, self.grid.unit, strict=True)]
        shape = [
            max((count - 1) * step + span, cells)
            for count, step, span, cells in zip(self.grid.shape, steps, spans, wanted, strict=True)
        ]
        total, weight = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        down, across = (_weights(span, blend) for span in spans)
        rows, columns = (self.tiles * np.array(steps)).T
        for i, row_weight in enumerate(down):
            for j, column_weight in enumerate(across):
                share = row_weight * column_weight
                if share:
                    # tiles of equal (i, j) never meet in a cell
                    total[rows + i, columns + j] += share * self.scores
                    weight[rows + i, columns + j] += share
        with np.errstate(invalid="ignore"):
            image = total / weight  # 0 / 0 is NaN
        return image[: wanted[0], : wanted[1]]


def _weights(span: int, blend: Blend) -> np.ndarray:
    """Of the cells along one side of a square."""
    if blend == "nearest":
        return (np.arange(span) == span // 2).astype(np.float64)
    if blend == "mean":
        return np.ones(span)
    return 1 - np.abs(np.arange(span) - (span - 1) / 2) / ((span + 1) / 2)


def tile_grid(
    view: SlideView, image_shape: tuple[int, int, int], stride: int | None = None, blend: str = "mean"
) -> TileGrid:
    """The tiles of a picture for a network that takes images of ``image_shape``.

    Args:
        view: the picture.
        image_shape: (H, W, 3).
        stride: distance between tiles in pixels of the view; by default they touch.
        blend: how they will be blended.

    Raises:
        UserError: the stride is no part or multiple of the square, gives too many tiles, or the blend is not known.
    """
    if blend not in get_args(Blend):
        raise UserError(f"--blend is {blend!r}: it must be one of {', '.join(get_args(Blend))}.")
    center = central_side(image_shape)
    height, width = image_shape[:2]
    side = (height, width) if center is None else (center, center)
    steps = side if stride is None else (stride, stride)
    if any(step < 1 or (whole % step and step % whole) for step, whole in zip(steps, side, strict=True)):
        squares = " x ".join(map(str, dict.fromkeys(side)))
        raise UserError(
            f"--stride is {stride}: it must divide {squares}, the side that a tile answers for, or be its multiple."
        )
    grid = TileGrid((view.height, view.width), (height, width), side, steps)
    if grid.shape[0] * grid.shape[1] > _MOST_TILES:
        raise UserError(
            f"{view.slide.name} would be cut into {grid.shape[0] * grid.shape[1]:,} tiles: take a longer --stride "
            "or a coarser --level."
        )
    return grid


def tissue_tiles(view: SlideView, grid: TileGrid, overview: np.ndarray | None) -> np.ndarray:
    """(row, column) of the tiles to look at, ``[n, 2] int64``, in the order in which they are read best.

    Args:
        view: the picture.
        grid: its tiles.
        overview: the picture made small, by which squares without tissue are left out; None takes all.
    """
    if overview is None:
        wanted = np.ones(grid.shape, bool)
    else:
        down, across = overview.shape[0] / view.height, overview.shape[1] / view.width
        wanted = boxes_with_tissue(
            tissue_mask(overview),
            np.arange(grid.shape[0]) * grid.stride[0] * down,
            np.arange(grid.shape[1]) * grid.stride[1] * across,
            (grid.side[0] * down, grid.side[1] * across),
        )
    tiles = np.argwhere(wanted)
    regions = (tiles * np.array(grid.stride)) // _REGION_SIDE
    return tiles[np.lexsort((tiles[:, 1], tiles[:, 0], regions[:, 1], regions[:, 0]))]


def natural_microns(slide: Slide, image_shape: tuple[int, int, int]) -> float | None:
    """The resolution that a network for PCam's patches wants of a slide that says its own; None for others."""
    known = slide.microns_per_pixel is not None and central_side(image_shape) is not None
    return PCAM_MICRONS if known else None


class TileSource:
    """The windows of tiles as a source for the loaders, cut from regions of which one is kept.

    Args:
        view: the picture.
        grid: its tiles.
        tiles: ``[n, 2]``, best in the order of `tissue_tiles`.
    """

    def __init__(self, view: SlideView, grid: TileGrid, tiles: np.ndarray) -> None:
        self._view, self._grid = view, grid
        self._corners = grid.windows(tiles)
        self._regions = (tiles * np.array(grid.stride)) // _REGION_SIDE
        self._held: tuple[tuple[int, int], tuple[int, int], np.ndarray] | None = None
        self.image_shape = (*grid.window, 3)
        self.labels = np.full(len(tiles), -1, np.int32)

    def __len__(self) -> int:
        return len(self._corners)

    def gather(self, indices: Any, out: np.ndarray | None = None) -> np.ndarray:
        """The windows at ``indices``, ``[n, H, W, 3] uint8``."""
        wanted = np.asarray(indices, np.int64)
        images = np.empty((len(wanted), *self.image_shape), np.uint8) if out is None else out
        height, width = self._grid.window
        for row, index in enumerate(wanted):
            (top, left), pixels = self._region(*self._regions[index].tolist())
            down, across = self._corners[index] - (top, left)
            images[row] = pixels[down : down + height, across : across + width]
        return images

    def _region(self, row: int, column: int) -> tuple[tuple[int, int], np.ndarray]:
        """The pixels that the tiles of a region see, and their corner."""
        if self._held is None or self._held[0] != (row, column):
            margin = np.subtract(self._grid.window, self._grid.side) // 2
            corner, size = [], []
            for number, axis in ((row, 0), (column, 1)):
                stride, start = self._grid.stride[axis], number * _REGION_SIDE
                first = -(-start // stride) * stride  # of the squares that begin within the region
                last = min((start + _REGION_SIDE - 1) // stride, self._grid.shape[axis] - 1) * stride
                corner.append(first - int(margin[axis]))
                size.append(last - first + self._grid.window[axis])
            place = (corner[0], corner[1])
            self._held = ((row, column), place, self._view.read(*place, size[0], size[1]))
        return self._held[1], self._held[2]


def tile_probabilities(
    predictors: Predictor | Sequence[Predictor],
    picture: np.ndarray | SlideView,
    *,
    stride: int | None = None,
    tissue: bool = True,
    stop: Stop | None = None,
) -> TileMap:
    """Probabilities over a big picture.

    Args:
        predictors: one, or several that are averaged; their ``tta`` counts.
        picture: ``[H, W, 3] uint8`` of any size, or a slide at one resolution.
        stride: distance between tiles in pixels; by default that at which the squares they answer for touch.
        tissue: leave out squares of glass.
        stop: polled between batches.

    Raises:
        UserError: the picture or the stride is impossible.
        Interrupted: a signal came.
    """
    several = [predictors] if isinstance(predictors, Predictor) else list(predictors)
    view = picture if isinstance(picture, SlideView) else SlideView(ArraySlide(picture))
    grid = tile_grid(view, several[0].image_shape, stride)
    tiles = tissue_tiles(view, grid, view.overview() if tissue else None)
    source = TileSource(view, grid, tiles)
    probs = mean_probabilities(several, source, np.arange(len(tiles)), stop)
    return TileMap(grid, view.scale, tiles, probs)
