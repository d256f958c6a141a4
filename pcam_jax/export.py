"""Export: ``python -m pcam_jax.export RUN --format stablehlo|onnx|safetensors --output FOLDER``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from pcam_jax.run.folder import open_run
from pcam_jax.runtime.command import run_command


@dataclasses.dataclass(frozen=True)
class ExportCommand:
    """Write a run as one folder that answers without it, and check that it answers alike."""

    run: tyro.conf.Positional[Path]
    """Run folder."""
    output: Path
    """Folder to make."""
    format: Literal["stablehlo", "onnx", "safetensors"] = "stablehlo"
    """stablehlo runs in any JAX on CPU or CUDA; onnx in onnxruntime and others; safetensors holds the weights alone,
    in torchvision's names for the families that it has."""


def main(argv: list[str]) -> None:
    """Parse the command line, export, and say what was checked."""
    command = tyro.cli(ExportCommand, args=argv, prog="python -m pcam_jax.export")
    run = open_run(command.run)

    from pcam_jax.inference.exporting import export_run

    done = export_run(run, command.format, command.output)
    if done.arithmetic_note:
        print(f"Note: {done.arithmetic_note}.")
    size = sum(facts["bytes"] for facts in done.manifest["files"].values())
    print(
        f"Checked on {done.examples} images of {done.on}: probabilities differ by at most {done.difference:.1g}."
    )
    print(
        f"Wrote {command.output}: {', '.join(done.manifest['files'])} ({size / 1e6:.1f} MB) and its manifest."
    )


if __name__ == "__main__":
    run_command(main)
