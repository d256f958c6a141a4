"""Evaluate: ``python -m pcam_jax.evaluate RUN... [--split validation]``.

Figures with intervals for each run, and its report.html. On the validation split it also fits the temperature, and
chooses the threshold where asked, and stores both in the run for predict and serve.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from pcam_jax.metrics.report import format_report
from pcam_jax.run.folder import Run, open_run
from pcam_jax.run.predictions import FOLDER, CalibrationRow, Evaluation
from pcam_jax.runtime.command import run_command
from pcam_jax.runtime.errors import UserError
from pcam_jax.runtime.signals import StopSignals

_CHECKED_EXAMPLES = 128  # half of explain's: seconds, and enough to see heat maps fail


@dataclasses.dataclass(frozen=True)
class StoreOption:
    """Which data."""

    store: str = ""
    """Store to evaluate on; by default the one each run was trained on."""


@dataclasses.dataclass(frozen=True)
class EvaluateCommand:
    """Say how good runs are, with intervals."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders."""
    data: StoreOption = StoreOption()
    split: str = "validation"
    """Split of the run (or of another store), or "all" for every labelled example."""
    tta: Literal["none", "d4"] = "none"
    """d4 averages over the eight symmetries of the square."""
    threshold: str = ""
    """Choose the threshold on validation: youden, sensitivity=0.95, specificity=0.9, cost=5 (a missed positive
    costs five false alarms), or a number. Without it the run's own rule, at first 0.5."""
    isotonic: tyro.conf.FlagCreatePairsOff[bool] = False
    """Also fit an isotonic calibration map on validation, for showing probabilities; submissions never use it."""
    resamples: int = 2000
    """Bootstrap resamples for the intervals; 0 leaves them out."""
    ensemble: tyro.conf.FlagCreatePairsOff[bool] = False
    """Also evaluate the mean of all runs."""
    report: bool = True
    """Write report.html and MODEL_CARD.md into each run, with heat maps of the worst mistakes."""


def main(argv: list[str]) -> None:
    """Parse the command line, evaluate and print."""
    command = tyro.cli(EvaluateCommand, args=argv, prog="python -m pcam_jax.evaluate")
    if not command.runs:
        raise UserError("Give one or more run folders: python -m pcam_jax.evaluate RUN.")
    if command.resamples and command.resamples < 100:
        raise UserError(f"--resamples is {command.resamples}: it must be 0, or at least 100.")
    if command.ensemble and len(command.runs) < 2:
        raise UserError("--ensemble evaluates the mean of several runs: name at least two.")
    runs = [open_run(path) for path in command.runs]

    from pcam_jax.inference.evaluation import evaluate_ensemble, evaluate_run
    from pcam_jax.inference.fitted_point import parse_threshold
    from pcam_jax.runtime import accelerator, distributed

    parse_threshold(command.threshold)  # a mistake is said before the first run has taken its time
    accelerator.configure(cpu_devices=accelerator.PREDICTING_DEVICES)
    evaluations = []
    with StopSignals() as stop:
        for run in runs:
            evaluation = evaluate_run(
                run,
                store=command.data.store,
                split=command.split,
                tta=command.tta,
                threshold=command.threshold,
                isotonic=command.isotonic,
                resamples=command.resamples,
                stop=stop,
            )
            evaluations.append(evaluation)
            if not distributed.is_first():
                continue  # it has given its share; the first process speaks and writes
            symmetries = ", mean over the eight symmetries" if command.tta == "d4" else ""
            print(f"\n{run.path} on {command.split}{symmetries}, weights of step {evaluation.step}:\n")
            print(format_report(evaluation.report))
            print(f"{_calibration_table(evaluation.calibration)}\n")
            if evaluation.meaning:
                print(f"{evaluation.meaning} ({_origin(evaluation.criterion)})\n")
            print(f"Wrote {run.path / FOLDER / evaluation.name}.csv and .json.")
            if command.report:
                print(f"Wrote {_report(run, evaluation, stop)}.")
    if command.ensemble and distributed.is_first():
        report = evaluate_ensemble(evaluations, runs[0].class_names, command.threshold, command.resamples)
        print(f"\nMean of {len(runs)} runs on {command.split}:\n\n{format_report(report)}")


def _report(run: Run, evaluation: Evaluation, stop: StopSignals) -> Path:
    """Write the run's report, with quick heat maps where `explain` has not made better ones of these weights."""
    from pcam_jax.inference.explanation import explain_run
    from pcam_jax.report.explanations import read_explanation, write_explanation
    from pcam_jax.report.run_report import write_report

    if read_explanation(run, evaluation) is None:
        explanation = explain_run(
            run, evaluation, methods=("grad_cam",), sample_size=_CHECKED_EXAMPLES, check=True, stop=stop
        )
        write_explanation(run, explanation)
    return write_report(run)


def _calibration_table(rows: tuple[CalibrationRow, ...]) -> str:
    """Proper scores and calibration errors before and after, as an aligned table."""
    width = max(len("calibration"), *(len(row.name) for row in rows))
    lines = [f"{'calibration':{width}}   AUROC     NLL   Brier     ECE  ECE (equal mass)"]
    lines.append("-" * len(lines[0]))
    for row in rows:
        figures = (row.auroc, row.nll, row.brier, row.ece, row.ece_equal_mass)
        lines.append(f"{row.name:{width}}" + "".join(f"{_figure(value):>8}" for value in figures))
    return "\n".join(lines)


def _figure(value: float) -> str:
    return "-" if value != value else f"{value:.4f}"


def _origin(criterion: str) -> str:
    """How a threshold came about, in words."""
    if criterion == "default":
        return "nothing was chosen: the more probable class counts; choose with --threshold"
    return "fixed by --threshold" if criterion == "fixed" else f"chosen on validation by {criterion}"


if __name__ == "__main__":
    run_command(main)
