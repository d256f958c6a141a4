"""Kill training again and again, resume it, and prove that nothing changed.

    python scripts/crash_test.py --kills 60

Runs are killed at random moments and at each stage of a save; each is resumed until it ends, and must then equal
a run that nobody touched: weights, optimizer state, history and predictions, bit for bit. Prints a table of what
was tried, how much work was lost and how long it took until the next step, and exits with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from crashes.faults import make_faults
from crashes.training import Fault, Life, Training

BATCH_SIZE, SAVE_EVERY = 16, 10
TIME_COLUMNS = ("seconds", "images_per_second", "wait_share")
# what decides a run's future and is easily forgotten in a checkpoint, in two mixtures
RECIPES: dict[str, dict[str, Any]] = {
    "host": {
        "data.placement": "host",
        "data.sampling": "balanced",
        "augment.horizontal-flip": True,
        "augment.rotation-degrees": 15.0,
        "augment.brightness": 0.1,
        "optimizer.name": "adamw",
        "optimizer.schedule": "plateau",
        "optimizer.plateau-patience": 1,
        "optimizer.ema-decay": 0.99,
        "train.early-stop-patience": 50,
    },
    "device": {
        "data.placement": "device",
        "augment.vertical-flip": True,
        "augment.hed-jitter": 0.02,
        "augment.mixup-alpha": 0.2,
        "loss.label-smoothing": 0.05,
        "optimizer.name": "sgd",
        "optimizer.momentum": 0.9,
        "optimizer.schedule": "one_cycle",
        "optimizer.peak-lr": 0.05,
        "optimizer.accumulate-steps": 2,
    },
}


def kill_until_done(
    command: Callable[[bool], Sequence[str | Path]],
    run: Path,
    examples: int,
    batch_size: int,
    faults: Sequence[Fault],
    kills: int,
) -> list[Life]:
    """Kill a run, resume it and kill it again, until it ends or ``kills`` are spent; then let it end.

    Raises:
        RuntimeError: a process ended in another way than asked, or a life lost what an earlier one had saved.
    """
    lives: list[Life] = []
    while len(lives) < kills:
        fault = faults[len(lives) % len(faults)]
        training = Training(command(run.exists()), run, examples, batch_size)
        life = training.end(fault)
        if life.exit_code == 0:
            return lives
        expected = -fault.signum if fault.signum == signal.SIGKILL else 128 + fault.signum
        if life.exit_code != expected:
            raise RuntimeError(f"exit code {life.exit_code} instead of {expected}: {life.said}")
        if life.saved_step < training.saved_at_start:
            raise RuntimeError(
                f"step {training.saved_at_start} was saved, then only {life.saved_step} was left"
            )
        if lives:
            lives[-1].recovered_seconds = life.seconds_to_first_step
        lives.append(life)
    subprocess.run([*map(str, command(run.exists()))], check=True, stdout=subprocess.DEVNULL)
    return lives


def differences(one: Path, other: Path) -> list[str]:
    """Names of what differs between two runs: arrays of their checkpoints, history, how they ended."""
    from pcam_jax.run.folder import open_run

    found = []
    runs = [open_run(one), open_run(other)]
    steps = [run.checkpoints.steps() for run in runs]
    if steps[0][-1] != steps[1][-1]:
        return [f"the last steps {steps}"]
    left, right = (run.checkpoints.load(steps[0][-1]).arrays for run in runs)
    found += [name for name in left if left[name].tobytes() != right[name].tobytes()]
    rows = [
        [{name: value for name, value in row.items() if name not in TIME_COLUMNS} for row in run.history()]
        for run in runs
    ]
    if repr(rows[0]) != repr(rows[1]):
        found.append("history.csv")
    if (runs[0].result or {})["best_step"] != (runs[1].result or {})["best_step"]:
        found.append("the best step")
    return found


def table(lives: Sequence[Life]) -> str:
    """Faults tried, lost work and time to recover, as Markdown."""
    lines = [
        "| fault | times | left on the disk | lost steps, median (most) | lost seconds, most "
        "| seconds to recover, median (most) | printed |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(life.fault for life in lives):
        these = [life for life in lives if life.fault == name]
        left = sorted({file for life in these for file in life.left_behind})
        said = re.sub(r"\d+", "N", these[-1].said) or "nothing"
        recovered = [life.recovered_seconds for life in these if life.recovered_seconds]
        recovery = f"{statistics.median(recovered):.1f} ({max(recovered):.1f})" if recovered else ""
        lines.append(
            f"| {name} | {len(these)} | {', '.join(left) or 'nothing'} "
            f"| {statistics.median(life.lost_steps for life in these):.0f} "
            f"({max(life.lost_steps for life in these)}) "
            f"| {max(life.lost_seconds for life in these):.1f} | {recovery} | {said} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Run the campaign."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--model", default="pcam_cnn3")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--folder", type=Path, help="where to work; by default a temporary folder")
    parser.add_argument("--output", type=Path, help="file for the lives as JSON")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="crash-test-"))
        )
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault(
            "JAX_COMPILATION_CACHE_DIR", str(folder / "xla")
        )  # killed writers write here too
        lives, failures = campaign(options, folder)
    recovered = [life.recovered_seconds for life in lives if life.recovered_seconds]
    print(f"\n{table(lives)}\n")
    print(
        f"{len(lives)} kills, saves every {SAVE_EVERY} steps; from the start of a process to its next step "
        f"{statistics.median(recovered):.1f} s (median), {max(recovered):.1f} s (most)."
    )
    if options.output:
        options.output.write_text(json.dumps([dataclasses.asdict(life) for life in lives], indent=1) + "\n")
    for failure in failures:
        print(f"DIFFERENT: {failure}", file=sys.stderr)
    print("NOT EQUAL" if failures else "All runs equal the ones that nobody touched, bit for bit.")
    return 1 if failures else 0


def campaign(options: argparse.Namespace, folder: Path) -> tuple[list[Life], list[str]]:
    """Kill runs of all recipes until the kills are spent."""
    from pcam_jax.data.sample import write_sample_store
    from pcam_jax.run.folder import open_run

    store = folder / "store"
    if not store.is_dir():
        write_sample_store(store, count=1000, test_count=60, image_size=options.image_size)
    chance, lives, failures = random.Random(options.seed), list[Life](), list[str]()
    straights: dict[str, Path] = {}
    round_number = 0
    while len(lives) < options.kills:
        recipe = list(RECIPES)[round_number % len(RECIPES)]
        straight, run = folder / f"{recipe}-straight", folder / f"{recipe}-{round_number}"
        shutil.rmtree(run, ignore_errors=True)
        base = training_command(options, store, RECIPES[recipe])
        if recipe not in straights:
            shutil.rmtree(straight, ignore_errors=True)
            print(f"{recipe}: training without a fault", flush=True)
            subprocess.run([*base, "--workdir", str(straight)], check=True, stdout=subprocess.DEVNULL)
            straights[recipe] = straight
        examples = sum(open_run(straight).environment["data"]["examples_by_class"]["train"])

        def command(resume: bool, base: list[str] = base, run: Path = run) -> list[str]:
            return [*base, "--workdir", str(run), *(["--resume"] if resume else [])]

        faults = make_faults(chance)
        chance.shuffle(faults)
        new = kill_until_done(command, run, examples, BATCH_SIZE, faults, options.kills - len(lives))
        lives += new
        reached = ", ".join(f"{life.first_step}-{life.last_step}" for life in new)
        different = differences(straight, run) + differing_predictions(straight, run, store, folder)
        failures += [f"{run}: {name}" for name in different]
        print(f"{recipe}: {len(new)} kills, steps {reached}: {different or 'equal'}", flush=True)
        round_number += 1
        if not new:
            raise RuntimeError("a run ended before it could be killed: take more --epochs")
    return lives, failures


def training_command(options: argparse.Namespace, store: Path, recipe: dict[str, Any]) -> list[str]:
    """The command line of a recipe, without its workdir."""
    settings = {
        "data.store": store,
        "model.name": options.model,
        "train.epochs": options.epochs,
        "train.batch-size": BATCH_SIZE,
        "checkpoint.every-steps": SAVE_EVERY,
        "tracking.tensorboard": True,
        **recipe,
    }
    command = [sys.executable, "-m", "pcam_jax.train"]
    for name, value in settings.items():
        command += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return command


def differing_predictions(straight: Path, run: Path, store: Path, folder: Path) -> list[str]:
    """Whether two runs predict other bytes."""
    contents = []
    for path in (straight, run):
        output = folder / "predictions.csv"
        command = [sys.executable, "-m", "pcam_jax.predict", str(path), str(store), "--output", str(output)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        contents.append(output.read_bytes())
    return [] if contents[0] == contents[1] else ["predictions"]


if __name__ == "__main__":
    sys.exit(main())
