"""What every figure shares: its colours, the look of its axes, and the way into a file.

Figures are built from matplotlib's objects only, without pyplot's global state, so that threads and notebooks are
safe. Colours are those of Okabe and Ito ("Color universal design", 2008), told apart by colour-blind readers; line
styles and markers repeat the distinction, so that a grey print can be read too.
"""

from __future__ import annotations

import os
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pcam_jax.runtime.errors import UserError
from pcam_jax.runtime.files import atomic_write

BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
)
GREY = "#666666"
SERIES_COLORS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, "#000000")
LEGEND_POINTS = 9
"""Size of a legend's letters: a figure of `new_axes`'s width is about as many pixels wide on a phone as points."""
SERIES_STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))


def write_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write ``figure`` as PNG (150 dots per inch) or SVG, by the suffix of ``path``.

    The same figure gives the same bytes: no date and no random names are stored.

    Raises:
        UserError: the suffix is neither .png nor .svg.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (".png", ".svg"):
        raise UserError(
            f"A figure is written as .png or .svg, not as {Path(path).name!r}: change the suffix."
        )
    metadata = {"Software": None} if suffix == ".png" else {"Date": None}
    with matplotlib.rc_context({"svg.hashsalt": "pcam-jax"}), atomic_write(path, "wb") as file:
        figure.savefig(file, format=suffix[1:], dpi=150, metadata=metadata)


def new_axes(
    columns: int = 1, rows: int = 1, width: float = 4.6, height: float = 3.6
) -> tuple[Figure, list[Axes]]:
    """Make ``rows x columns`` panels of ``width x height`` inches each; the axes are listed row by row."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained", facecolor="white")
    grid = figure.subplots(rows, columns, squeeze=False)
    return figure, [plain_axes(axes) for axes in grid.flat]


def plain_axes(axes: Axes) -> Axes:
    """Give axes the house look: a light grid behind the data, no box above and to the right."""
    axes.grid(True, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return axes
