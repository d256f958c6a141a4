"""Explain: ``python -m pcam_jax.explain RUN [--split validation]``.

Pictures of the examples worth looking at (missed positives first), with heat maps of what the network looked at.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from pcam_jax.run.folder import open_run
from pcam_jax.run.predictions import evaluation_name, evaluation_names, read_evaluation
from pcam_jax.runtime.command import run_command
from pcam_jax.runtime.errors import UserError
from pcam_jax.runtime.signals import StopSignals


@dataclasses.dataclass(frozen=True)
class ExplainCommand:
    """Show what a network looked at, in the examples worth looking at."""

    run: tyro.conf.Positional[Path]
    """Run folder."""
    split: str = "validation"
    """Which evaluated examples; those of validation are evaluated first where they were not yet."""
    tta: Literal["none", "d4"] = "none"
    """Which evaluation of theirs."""
    count: int = 8
    """Most examples of a kind (missed, false alarms, uncertain, certain)."""
    method: Literal["both", "grad_cam", "integrated_gradients"] = "both"
    """Which heat maps."""
    sample: int = 256
    """Examples of class 1 over which shares of heat are averaged and checked; 0 leaves them out."""
    check: tyro.conf.FlagCreatePairsOff[bool] = False
    """Also check the maps: removing the hottest tenth of the pixels must lower the score more than removing as
    much elsewhere; and where tumour masks exist, the hottest pixel should lie on tumour."""
    removal: Literal["both", "blur", "white"] = "both"
    """What --check puts in the place of removed pixels: the image blurred beyond recognition, or empty glass."""


def main(argv: list[str]) -> None:
    """Parse the command line, explain, write pictures and the report, and say what was found."""
    command = tyro.cli(ExplainCommand, args=argv, prog="python -m pcam_jax.explain")
    if command.count < 1 or command.sample < 0:
        raise UserError("--count must be at least 1, and --sample 0 or more.")
    if command.check and command.sample < 2:
        raise UserError("--check needs a --sample of at least 2 examples.")
    run = open_run(command.run)

    from pcam_jax.inference.evaluation import evaluate_run
    from pcam_jax.inference.explanation import explain_run
    from pcam_jax.inference.saliency import METHODS
    from pcam_jax.inference.saliency_check import REMOVALS
    from pcam_jax.report.console import explanation_lines
    from pcam_jax.report.explanations import write_explanation
    from pcam_jax.report.run_report import write_report
    from pcam_jax.runtime import accelerator

    name = evaluation_name(command.split, command.tta)
    accelerator.configure(cpu_devices=accelerator.PREDICTING_DEVICES)
    with StopSignals() as stop:
        if command.split == "validation" and name not in evaluation_names(run):
            evaluation = evaluate_run(run, tta=command.tta, stop=stop)
        else:
            evaluation = read_evaluation(run, name)
        explanation = explain_run(
            run,
            evaluation,
            methods=METHODS if command.method == "both" else (command.method,),
            count=command.count,
            sample_size=command.sample,
            check=command.check,
            removals=REMOVALS if command.removal == "both" else (command.removal,),
            stop=stop,
        )
    folder = write_explanation(run, explanation)
    print("\n".join(explanation_lines(explanation, run.class_names)))
    print(f"\nWrote {len(explanation.examples)} pictures and examples.csv into {folder}.")
    print(f"Wrote {write_report(run)}.")


if __name__ == "__main__":
    run_command(main)
