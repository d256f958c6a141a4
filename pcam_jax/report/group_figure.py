"""Figures of groups (slides, patients): a good mean can hide one on which the model fails."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from pcam_jax.metrics.calibration import wilson_interval
from pcam_jax.metrics.groups import GroupRow
from pcam_jax.report.canvas import BLUE, LEGEND_POINTS, VERMILLION, new_axes

MOST_NAMED = 40


def draw_groups(rows: Sequence[GroupRow], overall: float, title: str = "") -> Figure:
    """Draw each group's accuracy with its 95 % Wilson interval, the lowest first.

    Args:
        rows: of the groups.
        overall: accuracy over all examples, drawn as a line.
        title: above the axes.
    """
    ordered = sorted(rows, key=lambda row: (row.accuracy, row.group))
    accuracy = np.array([row.accuracy for row in ordered])
    counts = np.array([row.count for row in ordered], float)
    low, high = wilson_interval(accuracy, counts)
    places = np.arange(len(ordered))
    figure, (axes,) = new_axes(width=min(10.0, max(5.0, 2 + 0.2 * len(ordered))), height=3.4)
    axes.vlines(places, low, high, color=BLUE, alpha=0.45, linewidth=3 if len(ordered) <= MOST_NAMED else 1)
    axes.plot(places, accuracy, "o", color=BLUE, markersize=4 if len(ordered) <= MOST_NAMED else 2)
    axes.axhline(
        overall, color=VERMILLION, linestyle="--", linewidth=1.2, label=f"all together: {overall:.3f}"
    )
    axes.set_ylim(min(0.5, float(low.min()) - 0.02), 1.01)
    axes.set_ylabel("accuracy")
    if len(ordered) <= MOST_NAMED:
        axes.set_xticks(places, [row.group for row in ordered], rotation=90, fontsize=7)
    else:
        axes.set_xlabel(f"{len(ordered):,} groups by accuracy")
    axes.legend(frameon=False, fontsize=LEGEND_POINTS, loc="lower right")
    if title:
        axes.set_title(title)
    return figure
