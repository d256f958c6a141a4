"""What training says on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pcam_jax.runtime.command import python_command

_REMOVED = {"blur": "blurred away", "white": "made white"}


def layer_table(rows: Sequence[tuple[str, tuple[int, ...], int]]) -> str:
    """A net's layers, output shapes and parameters as an aligned table."""
    cells = [("layer", "output", "params")]
    cells += [(name, "x".join(map(str, shape)), f"{params:,}") for name, shape, params in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(3)]
    return "\n".join(
        f"  {name:{widths[0]}}  {shape:>{widths[1]}}  {params:>{widths[2]}}" for name, shape, params in cells
    )


def introduction(
    *, net: str, store: object, split: np.ndarray, home: str, warning: str | None, run: object
) -> str:
    """What is about to happen, and what looks wrong with it.

    Args:
        net: name, size and devices in words.
        store: where the images are.
        split: ``[N]`` names of each example's split; empty for what is left out.
        home: where the training images live, in words.
        warning: of the split, if any.
        run: the run folder.
    """
    counts = ", ".join(f"{int(np.sum(split == name)):,} {name}" for name in ("train", "validation", "test"))
    left = int(np.sum(split == ""))
    counts += f", {left:,} left out" if left else ""
    lines = [f"{net}.", f"{store}: {counts}; images {home}."]
    if warning:
        lines.append(f"Warning: {warning}")
    return "\n".join([*lines, f"Run: {run}"])


def stage_line(stage: int, epochs: tuple[int, int], params: tuple[int, int], learning_rate: float) -> str:
    """What one of two training stages does.

    Args:
        stage: 1, the head alone, or 2, everything.
        epochs: its first and last.
        params: how many the head has, and the whole network.
        learning_rate: the highest of its schedule.
    """
    what = "trains the head alone" if stage == 1 else "trains everything"
    return (
        f"Stage {stage}, epochs {epochs[0]} to {epochs[1]}: {what}, {params[stage - 1]:,} of {params[1]:,} "
        f"parameters, learning rate up to {learning_rate:g}."
    )


def epoch_line(row: Mapping[str, float], *, best: bool, staged: bool = False) -> str:
    """One epoch's figures on one line, with its stage where the run has two."""
    stage = f"stage {row['stage']:.0f}  " if staged else ""
    return (
        f"epoch {row['epoch']:>3.0f}  {stage}step {row['step']:>6.0f}  loss {row['train_loss']:.4f}  "
        f"accuracy {row['train_accuracy']:.4f}  |  validation loss {row['validation_loss']:.4f}  "
        f"accuracy {row['validation_accuracy']:.4f}  auroc {row['validation_auroc']:.4f}  |  "
        f"{row['images_per_second']:.0f} img/s  waiting {row['wait_share']:.1%}{'  best' if best else ''}"
    )


def ending(
    row: Mapping[str, float],
    labels: np.ndarray,
    *,
    reason: str,
    monitor: str,
    collapsed: bool,
    run: Any,
    store: str,
    has_test: bool,
) -> str:
    """Why training ended, which step is best with what figures, and the commands that come next.

    Args:
        row: the best epoch's figures.
        labels: ``[n]`` labels of the validation split.
        reason: why it ended.
        monitor: the figure that decided.
        collapsed: all validation examples got one probability.
        run: the run folder.
        store: the store as the user named it.
        has_test: it has a test split.
    """
    python, majority = python_command(), np.bincount(labels).max() / len(labels)
    lines = [
        "",
        f"Ended: {reason}. Best: epoch {row['epoch']:.0f}, step {row['step']:.0f}, by {monitor}.",
        "",
        f"  validation split, {len(labels):,} examples",
        f"    auroc      {row['validation_auroc']:.4f}",
        f"    accuracy   {row['validation_accuracy']:.4f}   (always the majority class: {majority:.4f})",
        f"    loss       {row['validation_loss']:.4f}",
    ]
    if row["skipped_steps"]:
        lines.append(f"    {row['skipped_steps']:.0f} steps were skipped for a non-finite loss or gradient")
    if collapsed:
        lines += [
            "",
            "Warning: this run has collapsed: every validation example gets the same probability. Try a lower "
            "optimizer.peak_lr, another train.seed, or more epochs.",
        ]
    images = (
        f"{store} --split test --output submission.csv" if has_test else "FOLDER --output predictions.csv"
    )
    return "\n".join(
        [
            *lines,
            "",
            "Next:",
            f"  {python} -m pcam_jax.evaluate {run}  # figures with intervals, report.html",
            f"  {python} -m pcam_jax.predict {run} {images}",
        ]
    )


def explanation_lines(explanation: Any, class_names: Sequence[str]) -> list[str]:
    """What heat maps show on average, and whether they can be believed.

    Args:
        explanation: a `pcam_jax.inference.explanation.Explanation`.
        class_names: by label.
    """
    lines = [f"{len(category.members):>3}  {category.title}" for category in explanation.categories]
    if explanation.sample_size < 2:
        return lines
    kind = class_names[1] if len(class_names) == 2 else "all classes"
    lines += ["", f"Means over {explanation.sample_size:,} examples ({kind}), with 95 % intervals:"]
    for method in explanation.methods:
        lines.append(f"  {method}")
        if method in explanation.central_share:
            share = _with_interval(explanation.central_share[method])
            lines.append(
                f"    heat in the central square    {share}   (even heat: {explanation.central_chance:.3f})"
            )
        if method in explanation.pointing:
            pointing = explanation.pointing[method]
            chance = f"(a random pixel: {pointing.chance.value:.3f})"
            lines.append(f"    hottest pixel in tumour       {_with_interval(pointing.hit_rate)}   {chance}")
        for fall in explanation.deletion.get(method, ()):
            removed = _REMOVED[fall.removal]
            lines += [
                f"    score falls, hottest tenth    {_with_interval(fall.hottest)}   ({removed})",
                f"      beyond a random place       {_with_interval(fall.above_moved)}   (0: heat means nothing)",
                f"      beyond another image's      {_with_interval(fall.above_elsewhere)}",
                f"      beyond scattered pixels     {_with_interval(fall.above_scattered)}",
            ]
    return lines


def _with_interval(metric: Any) -> str:
    return f"{metric.value:.3f} ({metric.low:.3f} to {metric.high:.3f})"
