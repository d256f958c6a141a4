"""The curve of a learning-rate range test."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from pcam_jax.report.canvas import BLUE, GREEN, GREY, LEGEND_POINTS, VERMILLION, new_axes


def draw_lr_range(
    rates: Sequence[float], losses: Sequence[float], means: Sequence[float], marks: Mapping[str, float]
) -> Figure:
    """Draw the loss over the learning rate.

    Args:
        rates: ``[n]`` learning rates.
        losses: ``[n]`` loss of the step at each.
        means: ``[m]`` smoothed losses, m <= n.
        marks: learning rates to point out, by name; at most three.
    """
    figure, (axes,) = new_axes(width=6.4, height=4.0)
    finite = [(rate, loss) for rate, loss in zip(rates, losses, strict=True) if math.isfinite(loss)]
    if finite:
        axes.plot(*zip(*finite, strict=True), ".", markersize=3, color=GREY, label="each step")
        axes.plot(rates[: len(means)], means, color=BLUE, label="smoothed")
        # a diverging end would press everything before it flat
        low, high = float(np.min(means)), float(np.max(means[: max(1, len(means) // 2)]))
        room = max(high - low, 1e-3)
        axes.set_ylim(low - 0.2 * room, high + 1.5 * room)
    styles = ((VERMILLION, "-"), (GREEN, "--"), (GREY, ":"))
    for (name, rate), (color, style) in zip(marks.items(), styles, strict=False):
        axes.axvline(rate, color=color, linestyle=style, linewidth=1.2, label=f"{name}: {rate:.2g}")
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss")
    axes.legend(frameon=False, fontsize=LEGEND_POINTS)
    return figure
