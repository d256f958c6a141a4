"""What each part of a recipe is worth: the same short training with one thing changed, several seeds each.

    python scripts/ablate.py --store data/pcam --workdir runs/ablation --output ablation

Every row trains `configs/pcam/fast.toml` for about the same time on the same split (`data.split_seed` 0) and is
evaluated on its validation patches, as they are and averaged over the symmetries. Runs that are there already are not
trained again, so a call that was stopped goes on.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
from throughput import record

BASE = "configs/pcam/fast.toml"
COMMON = ["--data.validation-fraction", "0.2"]
COLOUR = ["--augment.brightness", "0.1", "--augment.contrast", "0.1", "--augment.saturation", "0.1"]
AFFINE = ["--augment.rotation-degrees", "30", "--augment.zoom", "0.1"]
ROWS: dict[str, list[str]] = {
    "the base": [],
    "without the symmetries (D4)": ["--augment.no-d4"],
    "with light and stain jitter": [*COLOUR, "--augment.hed-jitter", "0.03"],
    "with rotation to 30 degrees and zoom to 0.1": AFFINE,
    "with mixup (alpha 0.2)": ["--augment.mixup-alpha", "0.2"],
    "with a moving average of the weights": ["--optimizer.ema-decay", "0.99"],
    "Adam at a constant 1e-3, no decay": [
        *["--optimizer.name", "adam", "--optimizer.schedule", "constant"],
        *["--optimizer.peak-lr", "1e-3", "--optimizer.weight-decay", "0"],
    ],
    "label smoothing 0.1": ["--loss.label-smoothing", "0.1"],
}


def main() -> None:
    """Train what is missing, evaluate it, print a table, and write it with its record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default=BASE, help="recipe that the rows change")
    parser.add_argument("--store", default="sample", help="store to train on")
    parser.add_argument("--workdir", type=Path, default=Path("runs/ablation"), help="folder of the runs")
    parser.add_argument("--rows", default="", help="numbers of the rows, separated by commas; all by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="another number of epochs for every row")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    options = parser.parse_args()
    wanted = [int(number) for number in options.rows.split(",") if number] or range(len(ROWS))
    results: list[dict[str, Any]] = []
    for number in wanted:
        name, changes = list(ROWS.items())[number]
        if options.epochs:
            changes = [*changes, "--train.epochs", str(options.epochs)]
        figures = [
            _figures(
                options.workdir / f"{number}-{seed}",
                [options.base, "--data.store", options.store, *COMMON, *changes, "--train.seed", str(seed)],
            )
            for seed in range(options.seeds)
        ]
        results.append({"row": name, "changes": changes, "seeds": figures})
        versions = {package: importlib.metadata.version(package) for package in ("pcam-jax", "jax")}
        facts = {"base": options.base, "common": COMMON, "results": results}
        record.write(options.output, versions, facts, markdown(results))
    print(markdown(results))


def _figures(run: Path, recipe: list[str]) -> dict[str, float]:
    """Validation AUROC of one run, trained if it is not there, and how long its training took."""
    predictions = run / "predictions/validation-d4.json"
    if not predictions.is_file():
        _verb(["train", *recipe, "--workdir", str(run), *(["--resume"] if run.is_dir() else [])])
        _verb(["evaluate", str(run), "--tta", "d4", "--resamples", "0", "--no-report"])
    history = pd.read_csv(run / "history.csv")
    return {
        "auroc": float(history["validation_auroc"].max()),
        "auroc_d4": json.loads(predictions.read_text())["figures"]["metrics"]["auroc"]["value"],
        "seconds": float(history["seconds"].sum()),
    }


def _verb(words: list[str]) -> None:
    subprocess.run([sys.executable, "-m", "pcam_jax", *words], check=True, stdout=subprocess.DEVNULL)


def markdown(results: list[dict[str, Any]]) -> str:
    """The results as a table: means over the seeds, and from the lowest to the highest."""
    lines = ["| recipe | AUROC | lowest-highest | with D4 averaging | seconds |", "|---|---|---|---|---|"]
    for result in results:
        plain, averaged, seconds = (
            [seed[key] for seed in result["seeds"]] for key in ("auroc", "auroc_d4", "seconds")
        )
        lines.append(
            f"| {result['row']} | {statistics.fmean(plain):.4f} | {min(plain):.4f}-{max(plain):.4f} | "
            f"{statistics.fmean(averaged):.4f} | {statistics.median(seconds):.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
