"""A slide's probabilities for people: the picture with its squares laid over it, a table, and how they were made."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pcam_jax.data.slide_view import SlideView
from pcam_jax.inference.tiles import Blend, TileMap
from pcam_jax.report.gallery import HEAT_COLORS
from pcam_jax.report.overlay import as_png
from pcam_jax.runtime.files import atomic_write, write_json_atomic

_LEAST_SIDE = 768  # smaller pictures are enlarged by a whole factor
_BAND = 128  # rows that are coloured at a time
_INK, _PAPER, _TISSUE = (20, 20, 20), (255, 255, 255), (214, 170, 205)
_SCALE_BARS = (10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)


def write_tile_map(
    output: Path,
    view: SlideView,
    overview: np.ndarray,
    found: TileMap,
    blend: Blend,
    class_names: Sequence[str],
    threshold: float,
    how: Mapping[str, Any],
) -> int:
    """Write ``output`` + .csv (a row per tile), .json (how it was made) and last .png (the picture).

    The columns ``x`` and ``y`` are the upper left corner of the square that a tile answers for, in pixels of the
    slide's full resolution; ``prob`` is that of class 1, or a column bears the name of each of several classes.

    Args:
        output: beginning of the names.
        view: the slide.
        overview: its overview, ``[h, w, 3] uint8``.
        found: the probabilities.
        blend: see `TileMap.image`.
        class_names: by label.
        threshold: of the outline.
        how: more to say in the JSON file.

    Returns:
        The number of tiles at or above the threshold.
    """
    table, corners = found.probs if found.probs.ndim == 2 else found.probs[:, None], found.corners()
    with atomic_write(_named(output, ".csv")) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["x", "y", *(["prob"] if found.probs.ndim == 1 else class_names)])
        for row in np.lexsort((found.tiles[:, 1], found.tiles[:, 0])):
            y, x = corners[row]
            writer.writerow([f"{x:.10g}", f"{y:.10g}", *(f"{value:.9g}" for value in table[row])])
    positive = int(np.sum(found.scores >= threshold))
    grid = found.grid
    facts = {
        "slide": view.slide.name,
        **how,
        "classes": list(class_names),
        "level": view.level,
        "full_resolution_pixels_per_pixel": view.scale,
        "microns_per_pixel": view.microns_per_pixel,
        "size": {"height": view.height, "width": view.width},
        "window": list(grid.window),
        "square": list(grid.side),
        "stride": list(grid.stride),
        "blend": blend,
        "tiles": len(found.tiles),
        "tiles_of_glass": grid.shape[0] * grid.shape[1] - len(found.tiles),
        "threshold": threshold,
        "tiles_at_or_above_threshold": positive,
    }
    write_json_atomic(_named(output, ".json"), facts)
    scale = overview.shape[0] / view.height, overview.shape[1] / view.width
    picture = draw_tile_picture(
        overview,
        found.image(blend),
        (grid.unit[0] * scale[0], grid.unit[1] * scale[1]),
        threshold,
        meaning=meaning_of(class_names),
        microns_per_pixel=None if view.microns_per_pixel is None else view.microns_per_pixel / scale[1],
    )
    with atomic_write(_named(output, ".png"), "wb") as file:
        file.write(as_png(picture))
    return positive


def meaning_of(class_names: Sequence[str]) -> str:
    """What the one number shown of each tile is the probability of."""
    return class_names[1] if len(class_names) == 2 else f"any but {class_names[0]}"


def _named(output: Path, suffix: str) -> Path:
    return output.with_name(output.name + suffix)


def lay_probabilities(
    overview: np.ndarray, probs: np.ndarray, cell: tuple[float, float], threshold: float
) -> np.ndarray:
    """Lay probabilities over a picture: nothing at 0, teal over green to yellow at 1, outlined at the threshold.

    Args:
        overview: ``[h, w, 3] uint8``.
        probs: ``[rows, columns]``, NaN where there is none.
        cell: height and width of a cell of ``probs`` in pixels of the overview.
        threshold: cells at or above it are outlined.

    Returns:
        ``[h, w, 3] uint8``.
    """
    rows, columns = (
        np.minimum(((np.arange(length) + 0.5) / side).astype(np.int64), count - 1)
        for length, side, count in zip(overview.shape[:2], cell, probs.shape, strict=True)
    )
    mixed = np.empty_like(overview)
    called = np.empty(overview.shape[:2], bool)
    for first in range(0, len(rows), _BAND):  # colours in floats take ten times the picture's room
        band = slice(first, first + _BAND)
        values = probs[np.ix_(rows[band], columns)]
        colors = HEAT_COLORS(np.nan_to_num(values, nan=0.0))
        alpha = np.where(np.isnan(values), 0.0, colors[..., 3])[..., None]
        mixed[band] = np.round(overview[band] * (1 - alpha) + 255 * colors[..., :3] * alpha)
        called[band] = np.nan_to_num(values, nan=-1.0) >= threshold
    around = np.pad(called, 1, constant_values=False)
    inner = around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
    mixed[called & ~inner] = _INK
    return mixed


def draw_tile_picture(
    overview: np.ndarray,
    probs: np.ndarray,
    cell: tuple[float, float],
    threshold: float,
    *,
    meaning: str,
    microns_per_pixel: float | None = None,
) -> Image.Image:
    """The picture with its probabilities, a colour bar, the outline's meaning, and a scale bar where known.

    Args:
        overview: ``[h, w, 3] uint8``.
        probs: ``[rows, columns]``, NaN where there is none.
        cell: height and width of a cell in pixels of the overview.
        threshold: of the outline.
        meaning: what the probabilities are of.
        microns_per_pixel: of the overview.
    """
    factor = max(1, -(-_LEAST_SIDE // max(overview.shape[:2])))
    if factor > 1:
        overview = overview.repeat(factor, axis=0).repeat(factor, axis=1)
        cell = (cell[0] * factor, cell[1] * factor)
    body = Image.fromarray(lay_probabilities(overview, probs, cell, threshold))
    microns = None if microns_per_pixel is None else microns_per_pixel / factor
    # as legible beside a large picture as beside a small one
    legend = _legend(threshold, meaning, microns, enlarged=max(1.0, body.width / 1000))
    page = Image.new("RGB", (max(body.width, legend.width), body.height + legend.height), _PAPER)
    page.paste(body, (0, 0))
    page.paste(legend, (0, body.height))
    return page


def _legend(
    threshold: float, meaning: str, microns_per_pixel: float | None, *, enlarged: float
) -> Image.Image:
    """Colour bar with the threshold, what is shown, and the scale bar."""
    bar_width, bar_height, margin, line = (round(enlarged * side) for side in (200, 14, 12, 20))
    # matplotlib's own font: Pillow's has no Greek
    font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", round(13 * enlarged))
    words = f"probability of {meaning}; outlined: {threshold:.3g} or more"
    width = bar_width + 3 * margin + max(bar_width + 8 * line, round(font.getlength(words)))
    page = Image.new("RGB", (width, 2 * margin + 2 * line), _PAPER)
    pen = ImageDraw.Draw(page)
    colors = HEAT_COLORS(np.linspace(0, 1, bar_width))
    bar = np.array(_TISSUE) * (1 - colors[:, 3:]) + 255 * colors[:, :3] * colors[:, 3:]
    strip = np.broadcast_to(bar.round().astype(np.uint8), (bar_height, bar_width, 3))
    page.paste(Image.fromarray(strip.copy()), (margin, margin))
    bottom = margin + bar_height
    pen.rectangle((margin, margin, margin + bar_width - 1, bottom - 1), outline=_INK)
    place = margin + round(float(np.clip(threshold, 0, 1)) * (bar_width - 1))
    pen.line((place, margin - 3, place, bottom + 2), fill=_INK, width=max(2, round(2 * enlarged)))
    pen.text((margin, bottom + 2), "0", _INK, font)
    pen.text((margin + bar_width, bottom + 2), "1", _INK, font, anchor="ra")
    left = 2 * margin + bar_width
    pen.text((left, margin), words, _INK, font)
    if microns_per_pixel is not None:
        fitting = [length for length in _SCALE_BARS if length / microns_per_pixel <= bar_width]
        length = max(fitting, default=_SCALE_BARS[0])
        right, middle = left + round(length / microns_per_pixel), margin + line + line // 2
        pen.rectangle((left, middle, right, middle + round(2 * enlarged)), fill=_INK)
        text = f"{length} µm" if length < 1000 else f"{length // 1000} mm"
        pen.text((right + margin // 2, middle), text, _INK, font, anchor="lm")
    return page
