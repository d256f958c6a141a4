"""Pictures in rows: patches with their labels, and what a net looked at."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from pcam_jax.runtime.errors import UserError

PANEL_INCHES = 1.5


def _heat_colors() -> ListedColormap:
    """Teal over green to yellow, which no stain has, and as clear as glass where there is no heat.

    It is the upper part of viridis, which rises evenly in lightness.
    """
    colors = matplotlib.colormaps["viridis"](np.linspace(0.45, 1, 256))
    colors[:, 3] = 0.8 * np.linspace(0, 1, 256) ** 0.6
    return ListedColormap(colors, "heat")


HEAT_COLORS = _heat_colors()


def draw_sample_grid(
    images: NDArray[np.uint8],
    captions: Sequence[str] | None = None,
    columns: int = 8,
    center: int | None = None,
    title: str = "",
) -> Figure:
    """Draw patches in rows.

    Args:
        images: `[N, H, W, 3] uint8`.
        captions: one per image.
        columns: patches a row.
        center: side in pixels of the central square to outline (32 for PCam, whose labels tell of it alone).
        title: above all.

    Raises:
        UserError: no images, another shape, or another number of captions.
    """
    _check_images(images, captions)
    figure, panels = _panels(len(images), columns, panels_each=1, title=title, captioned=captions is not None)
    for place, (axes, image) in enumerate(zip(panels, images, strict=False)):
        _show(axes, image, center)
        if captions is not None:
            axes.set_title(captions[place], fontsize=7, pad=2)
    return figure


def draw_overlay_gallery(
    images: NDArray[np.uint8],
    heat: NDArray[np.floating],
    captions: Sequence[str] | None = None,
    columns: int = 4,
    center: int | None = None,
    title: str = "",
) -> Figure:
    """Draw each patch beside itself with its heat map laid over it.

    Heat is scaled per patch from its lowest value to its highest, so colours tell where, not how much.

    Args:
        images: `[N, H, W, 3] uint8`.
        heat: `[N, H, W]` floats, one value per pixel.
        captions: one per image.
        columns: pairs a row.
        center: side in pixels of the central square to outline.
        title: above all.

    Raises:
        UserError: no images, shapes that do not fit, another number of captions, or heat that is not finite.
    """
    _check_images(images, captions)
    if heat.shape != images.shape[:3]:
        raise UserError(f"Heat maps have shape {heat.shape}, but the images need {images.shape[:3]}.")
    broken = int(np.count_nonzero(~np.isfinite(heat).all(axis=(1, 2))))
    if broken:
        raise UserError(f"{broken} of {len(heat)} heat maps hold values that are not finite.")
    figure, panels = _panels(len(images), columns, panels_each=2, title=title, captioned=captions is not None)
    figure.set_figwidth(figure.get_figwidth() + 0.9)  # the colour bar
    for place, image in enumerate(images):
        plain, covered = panels[2 * place], panels[2 * place + 1]
        _show(plain, image, center)
        _show(covered, image, center)
        covered.imshow(scaled_heat(heat[place]), cmap=HEAT_COLORS, vmin=0, vmax=1, interpolation="bilinear")
        if captions is not None:
            plain.set_title(captions[place], fontsize=7, pad=2, loc="left")
    colors = ScalarMappable(Normalize(0, 1), HEAT_COLORS)
    bar = figure.colorbar(colors, ax=panels, shrink=0.5, aspect=30, pad=0.01)
    bar.set_ticks([0, 1], labels=["least", "most"])
    bar.set_label("weight in the prediction, per patch")
    return figure


def scaled_heat(heat: NDArray[np.floating]) -> NDArray[np.float64]:
    """Scale a heat map to 0..1; one that is flat becomes all 0."""
    values = np.asarray(heat, dtype=np.float64)
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


def _panels(
    count: int, columns: int, panels_each: int, title: str, captioned: bool
) -> tuple[Figure, list[Axes]]:
    across = max(1, min(columns, count)) * panels_each
    rows = -(-count * panels_each // across)
    height = PANEL_INCHES * (1.1 if captioned else 1.0)
    width = max(PANEL_INCHES * across, 3.0)
    figure = Figure(
        figsize=(width, height * rows + (0.4 if title else 0)), layout="constrained", facecolor="white"
    )
    axes = list(figure.subplots(rows, across, squeeze=False).flat)
    for one in axes:
        one.set_axis_off()
    if title:
        figure.suptitle(title)
    return figure, axes


def _show(axes: Axes, image: NDArray[np.uint8], center: int | None) -> None:
    axes.imshow(image, interpolation="nearest")
    if center is None:
        return
    height, width = image.shape[:2]
    corner = ((width - center) / 2 - 0.5, (height - center) / 2 - 0.5)
    for color, style in (("white", "-"), ("black", (0, (3, 3)))):  # two colours: seen on any stain
        axes.add_patch(
            Rectangle(corner, center, center, fill=False, edgecolor=color, linewidth=0.9, linestyle=style)
        )


def _check_images(images: NDArray[np.uint8], captions: Sequence[str] | None) -> None:
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or not len(images):
        raise UserError(
            f"Images have shape {images.shape} and type {images.dtype}: at least one of [N, H, W, 3] uint8 is needed."
        )
    if captions is not None and len(captions) != len(images):
        raise UserError(f"There are {len(captions)} captions for {len(images)} images.")
