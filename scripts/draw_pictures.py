"""Draw the pictures of README.md and docs/ from the code; `make docs` runs it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from pcam_jax.data.sample import CLASS_NAMES, sample_patches
from pcam_jax.data.scene import centre_of

DOCS = Path(__file__).parents[1] / "docs"
PER_ROW = 8
COLOURS = 96  # keeps the file small; stained tissue has few hues


def main() -> None:
    """Draw all pictures."""
    draw_sample(DOCS / "sample-patches.png")


def draw_sample(path: Path) -> None:
    """A row of patches of each class from the embedded sample, with the square that decides the label."""
    patches = sample_patches(200, seed=0)
    height, width = patches.images.shape[1:3]
    figure = Figure(figsize=(PER_ROW, 2.03), dpi=110)
    axes = figure.subplots(2, PER_ROW)
    centre = centre_of(height)
    for row, name in zip(axes, CLASS_NAMES, strict=True):
        members = np.flatnonzero(patches.labels == CLASS_NAMES.index(name))[:PER_ROW]
        for axis, member in zip(row, members, strict=True):
            axis.imshow(patches.images[member], extent=(0, width, height, 0))
            side = centre.stop - centre.start
            axis.add_patch(
                Rectangle(
                    (centre.start, centre.start), side, side, fill=False, edgecolor="white", linewidth=0.8
                )
            )
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(name, fontsize=9)
    figure.subplots_adjust(left=0.03, right=0.997, bottom=0.01, top=0.99, wspace=0.04, hspace=0.04)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    Image.open(drawn).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main()
