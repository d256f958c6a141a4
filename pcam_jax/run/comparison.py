"""Several runs on the same examples: what each costs, how good each is, and whether they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pcam_jax.metrics.comparison import (
    DelongTest,
    Difference,
    McnemarTest,
    delong_test,
    holm_adjusted,
    mcnemar_test,
    paired_bootstrap,
)
from pcam_jax.metrics.threshold import predicted_classes
from pcam_jax.run.folder import Run
from pcam_jax.run.predictions import Evaluation, evaluation_name, read_evaluation
from pcam_jax.runtime.errors import UserError


@dataclass(frozen=True)
class ComparedRun:
    """One run and its evaluation.

    Attributes:
        name: short, and different for each.
        run: the run.
        evaluation: of it.
        epochs: trained so far.
        train_seconds: spent on training steps.
        train_rate: images trained on per second, median over epochs.
    """

    name: str
    run: Run
    evaluation: Evaluation
    epochs: int
    train_seconds: float
    train_rate: float


@dataclass(frozen=True)
class PairTest:
    """The reference run against another one; differences are reference minus other.

    Attributes:
        name: of the other run.
        differences: of every figure, by paired bootstrap; empty where no resamples were asked for.
        delong: of the AUROCs, groups respected; None with more than two classes.
        delong_adjusted: its p-value, adjusted by Holm for the number of runs compared.
        mcnemar: of the calls; it takes examples as independent.
    """

    name: str
    differences: dict[str, Difference]
    delong: DelongTest | None
    delong_adjusted: float
    mcnemar: McnemarTest


@dataclass(frozen=True)
class Comparison:
    """Runs in the order given.

    Attributes:
        split: evaluated.
        runs: at least two.
        reference: the one of highest AUROC, which the others are tested against.
        tests: one per other run.
        grouped: whole groups were drawn and counted.
    """

    split: str
    runs: list[ComparedRun]
    reference: ComparedRun
    tests: list[PairTest]
    grouped: bool


def compare_runs(
    runs: Sequence[Run], split: str = "validation", tta: str = "none", resamples: int = 2000
) -> Comparison:
    """Compare runs that were evaluated on the same examples.

    Args:
        runs: two or more.
        split: what they were evaluated on.
        tta: how.
        resamples: of the paired bootstrap; 0 leaves it out.

    Raises:
        UserError: fewer than two runs, one that was not evaluated so, or other examples or classes.
    """
    if len({run.path.resolve() for run in runs}) < max(2, len(runs)):
        raise UserError("A comparison needs two or more different runs.")
    name = evaluation_name(split, tta)
    evaluations = [read_evaluation(run, name) for run in runs]
    first = evaluations[0]
    for run, evaluation in zip(runs[1:], evaluations[1:], strict=True):
        if evaluation.report.class_names != first.report.class_names:
            raise UserError(
                f"{run.path} tells {', '.join(evaluation.report.class_names)} apart, {runs[0].path} "
                f"{', '.join(first.report.class_names)}: these cannot be compared."
            )
        if evaluation.examples_digest != first.examples_digest:
            raise UserError(_different_examples(runs[0], first, run, evaluation))
    compared = [
        _compared(short, run, evaluation)
        for short, run, evaluation in zip(_short_names(runs), runs, evaluations, strict=True)
    ]
    merit = [evaluation.report.metrics["auroc"].value for evaluation in evaluations]
    reference = compared[int(np.argmax(np.nan_to_num(merit, nan=-1.0)))]
    groups = first.groups if (first.groups != "").any() else None
    others = [one for one in compared if one is not reference]
    tests = [_pair_test(reference, other, groups, resamples) for other in others]
    adjusted = holm_adjusted([np.nan if test.delong is None else test.delong.p_value for test in tests])
    tests = [
        PairTest(test.name, test.differences, test.delong, float(p_value), test.mcnemar)
        for test, p_value in zip(tests, adjusted, strict=True)
    ]
    return Comparison(split, compared, reference, tests, groups is not None)


def _compared(name: str, run: Run, evaluation: Evaluation) -> ComparedRun:
    history = run.history()
    rates = [row["images_per_second"] for row in history]
    return ComparedRun(
        name=name,
        run=run,
        evaluation=evaluation,
        epochs=len(history),
        train_seconds=float(sum(row["seconds"] for row in history)),
        train_rate=float(np.median(rates)) if rates else float("nan"),
    )


def _pair_test(
    reference: ComparedRun, other: ComparedRun, groups: np.ndarray | None, resamples: int
) -> PairTest:
    one, two = reference.evaluation, other.evaluation
    thresholds = (one.report.decision_threshold, two.report.decision_threshold)
    differences: dict[str, Difference] = {}
    if resamples:
        differences = paired_bootstrap(
            one.labels, one.probs, two.probs, thresholds=thresholds, groups=groups, resamples=resamples
        )
    delong = None
    if one.probs.ndim == 1:
        delong = delong_test(one.labels, one.probs, two.probs, groups)
    mcnemar = mcnemar_test(
        one.labels,
        predicted_classes(one.probs, thresholds[0]),
        predicted_classes(two.probs, thresholds[1]),
        class_count=len(one.report.class_names),
    )
    return PairTest(other.name, differences, delong, float("nan"), mcnemar)


def _short_names(runs: Sequence[Run]) -> list[str]:
    """Folder names; whole paths where two folders bear the same one."""
    names = [run.path.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]


def _different_examples(first: Run, one: Evaluation, second: Run, other: Evaluation) -> str:
    shared = len(np.intersect1d(one.ids, other.ids))
    return (
        f"{first.path} and {second.path} were evaluated on different examples ({len(one.ids):,} and "
        f"{len(other.ids):,}, {shared:,} shared): compare runs of the same split (data.split_seed, data.fold), or "
        "evaluate both on a store that neither has seen, with --split all."
    )
