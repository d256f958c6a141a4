"""One example as a strip of pictures: the patch as it is, then with each method's heat laid over it."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from pcam_jax.report.gallery import HEAT_COLORS, scaled_heat

PANEL_PIXELS = 192
"""Least height of a strip: small patches are enlarged by a whole factor."""
LARGEST_PANEL = 384
GAP = 4


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Lay heat over an image: `[H, W, 3] uint8` of `[H, W, 3] uint8` and `[H, W]` floats.

    Heat is scaled from its lowest value to its highest, so colours tell where, not how much; without heat the image
    stays as it is.
    """
    colors = HEAT_COLORS(scaled_heat(heat))
    alpha = colors[..., 3:]
    mixed = image * (1 - alpha) + 255 * colors[..., :3] * alpha
    return np.round(mixed).astype(np.uint8)


def draw_strip(
    image: np.ndarray, heats: Sequence[np.ndarray], central_side: int | None = None
) -> Image.Image:
    """The image and its overlays side by side, enlarged, the central square outlined in each.

    Args:
        image: `[H, W, 3] uint8`.
        heats: `[H, W]` floats each.
        central_side: side of the square in pixels of the image, or None.
    """
    height, width = image.shape[:2]
    factor = panel_factor(height, width)
    size = (round(width * factor), round(height * factor))
    panels = [image, *(overlay(image, heat) for heat in heats)]
    strip = Image.new("RGB", (len(panels) * (size[0] + GAP) - GAP, size[1]), "white")
    for place, panel in enumerate(panels):
        picture = Image.fromarray(panel).resize(size, Image.Resampling.BICUBIC)
        if central_side:
            _outline(picture, central_side * factor)
        strip.paste(picture, (place * (size[0] + GAP), 0))
    return strip


def panel_factor(height: int, width: int) -> float:
    """By how much a patch is enlarged (a whole factor) or made smaller."""
    if max(height, width) > LARGEST_PANEL:
        return LARGEST_PANEL / max(height, width)
    return max(1, round(PANEL_PIXELS / height))


def as_png(picture: Image.Image) -> bytes:
    """The picture's bytes as a PNG file."""
    file = io.BytesIO()
    picture.save(file, "png")
    return file.getvalue()


def as_jpeg(picture: Image.Image, quality: int = 85) -> bytes:
    """The picture's bytes as a JPEG file, about a tenth of the PNG's."""
    file = io.BytesIO()
    picture.convert("RGB").save(file, "jpeg", quality=quality, optimize=True)
    return file.getvalue()


def _outline(picture: Image.Image, side: float) -> None:
    left, top = (picture.width - side) / 2, (picture.height - side) / 2
    pen = ImageDraw.Draw(picture)
    for grow, color in ((1, "black"), (0, "white")):  # two colours: seen on any stain
        pen.rectangle(
            (left - grow, top - grow, left + side - 1 + grow, top + side - 1 + grow), outline=color, width=1
        )
