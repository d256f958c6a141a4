"""Compare: ``python -m pcam_jax.compare RUN RUN ...``: one table, one figure, and whether the runs differ."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from pcam_jax.run.comparison import compare_runs
from pcam_jax.run.folder import open_run
from pcam_jax.runtime.command import run_command
from pcam_jax.runtime.errors import UserError
from pcam_jax.runtime.files import write_text_atomic


@dataclasses.dataclass(frozen=True)
class CompareCommand:
    """Put runs that were evaluated on the same examples side by side."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, evaluated before."""
    split: str = "validation"
    """What they were evaluated on."""
    tta: Literal["none", "d4"] = "none"
    """How they were evaluated."""
    resamples: int = 2000
    """Resamples of the paired bootstrap; 0 leaves it out."""
    output: Path = Path("comparison.html")
    """A page (.html), or the figure alone (.png or .svg)."""


def main(argv: list[str]) -> None:
    """Parse the command line, compare, print the table and write the page."""
    command = tyro.cli(CompareCommand, args=argv, prog="python -m pcam_jax.compare")
    if len(command.runs) < 2:
        raise UserError("Give two or more run folders: python -m pcam_jax.compare RUN RUN.")
    if command.resamples and command.resamples < 100:
        raise UserError(f"--resamples is {command.resamples}: it must be 0, or at least 100.")
    suffix = command.output.suffix.lower()
    if suffix not in (".html", ".png", ".svg"):
        raise UserError(f"--output is {command.output}: it must end in .html, .png or .svg.")
    if not command.output.absolute().parent.is_dir():
        raise UserError(f"There is no folder {command.output.parent} for --output: make it first.")
    runs = [open_run(path) for path in command.runs]
    comparison = compare_runs(runs, command.split, command.tta, command.resamples)

    from pcam_jax.report.canvas import write_figure
    from pcam_jax.report.comparison import comparison_page, comparison_text, draw_comparison

    print(comparison_text(comparison))
    if suffix == ".html":
        write_text_atomic(command.output, comparison_page(comparison))
    else:
        write_figure(draw_comparison(comparison), command.output)
    print(f"\nWrote {command.output}.")


if __name__ == "__main__":
    run_command(main)
