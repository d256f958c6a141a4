"""Find a learning rate: ``python -m pcam_jax.find_lr [CONFIG.toml] [--table.key VALUE ...] [--output lr.png]``.

The learning rate rises exponentially from step to step while the real training step runs, with the recipe's
network, augmentation, loss and optimizer, until the loss diverges. Nothing but a figure and a table is written.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import numpy as np
import tyro

from pcam_jax.config.rules import check_config
from pcam_jax.config.schema import Config
from pcam_jax.data.named import open_named_store
from pcam_jax.data.split import assign_splits
from pcam_jax.inference.starting_weights import load_starting_weights
from pcam_jax.report.canvas import write_figure
from pcam_jax.report.lr_figure import draw_lr_range
from pcam_jax.run.command_line import ConfigCommand, options_for, parse_config_command
from pcam_jax.runtime import accelerator, sharding
from pcam_jax.runtime.command import python_command, run_command
from pcam_jax.runtime.errors import Interrupted, UserError
from pcam_jax.runtime.files import atomic_write
from pcam_jax.runtime.progress import progress
from pcam_jax.runtime.signals import StopSignals
from pcam_jax.training.lr_range import Suggestion, has_diverged, rounded, smoothed, suggest, sweep
from pcam_jax.training.setup import Setup

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class FindLrCommand(ConfigCommand):
    """Try rising learning rates and suggest one."""

    output: Annotated[Path, tyro.conf.arg(metavar="FILE.png")] = Path("lr.png")
    """Where the curve goes (.png or .svg); its table takes the same name with .csv."""
    lowest: float = 1e-7
    """Learning rate of the first step."""
    highest: float = 10.0
    """Learning rate of the last step, unless the loss diverges before."""
    steps: int = 200
    """Steps from the lowest to the highest."""
    head_only: tyro.conf.FlagCreatePairsOff[bool] = False
    """Train the head alone, as in the frozen epochs: suggests optimizer.freeze_lr."""


@dataclasses.dataclass(frozen=True)
class LrRange:
    """What a range test measured."""

    rates: list[float]
    """Learning rate of each step that ran."""
    losses: list[float]
    """Loss of each; the last may be no number."""
    suggestion: Suggestion | None
    """None if the loss never fell."""


def main(argv: list[str]) -> None:
    """Parse the command line, run the test, write and say what it found."""
    command = parse_config_command(
        FindLrCommand,
        argv,
        prog="python -m pcam_jax.find_lr",
        description="Try rising learning rates on the real training step and suggest one.",
    )
    if command.output.suffix.lower() not in (".png", ".svg"):
        raise UserError(f"--output is {command.output}: the curve is written as .png or .svg.")
    if not command.output.absolute().parent.is_dir():
        raise UserError(f"There is no folder {command.output.parent} for --output: make it first.")
    config = command.settings()
    found = find_lr(
        config,
        lowest=command.lowest,
        highest=command.highest,
        steps=command.steps,
        head_only=command.head_only,
    )
    table = command.output.with_suffix(".csv")
    marks = {}
    if found.suggestion is not None:
        marks = {"suggestion": rounded(found.suggestion.valley), "steepest": found.suggestion.steepest}
    means = smoothed([loss for loss in found.losses if math.isfinite(loss)]).tolist()
    write_figure(draw_lr_range(found.rates, found.losses, means, marks), command.output)
    _write_table(table, found, means)
    print(f"Wrote {command.output} and {table}.")
    if found.suggestion is None:
        raise UserError(
            f"The loss did not fall at any learning rate from {found.rates[0]:g} to {found.rates[-1]:g}: look at "
            f"{command.output}, check the data with `python -m pcam_jax.audit`, or try more --steps."
        )
    _say_suggestion(found.suggestion, command)


def find_lr(
    config: Config,
    *,
    lowest: float = 1e-7,
    highest: float = 10.0,
    steps: int = 200,
    head_only: bool = False,
    say: Say = print,
) -> LrRange:
    """Run a learning-rate range test.

    Args:
        config: of the run whose learning rate is wanted; its schedule and epochs do not matter.
        lowest: learning rate of the first step.
        highest: learning rate of the last step, unless the loss diverges before.
        steps: from the one to the other.
        head_only: the body stands still.
        say: takes each line meant for a person.

    Raises:
        UserError: settings or data are not usable.
        Interrupted: SIGINT or SIGTERM came.
    """
    check_config(config)
    if not 0 < lowest < highest < math.inf:
        raise UserError(f"--lowest is {lowest:g} and --highest {highest:g}: they must be above 0 and rise.")
    if steps < 20:
        raise UserError(f"--steps is {steps}: fewer than 20 tell nothing.")
    accelerator.configure(config.train.deterministic, config.train.cpu_devices)
    store = open_named_store(config.data.store)
    setup = Setup(config, store, assign_splits(store.index, config.data))
    weights = None
    if config.model.init_from:
        starting = load_starting_weights(config, setup.net)
        weights = starting.weights
        for sentence in starting.sentences:
            say(sentence)
    rates = sweep(lowest, highest, steps)
    # the rate comes with the state, as a plateau's factor does: one program for every sweep
    optimizer = dataclasses.replace(setup.optimizer, schedule=lambda step: jnp.ones((), jnp.float32))
    batches = setup.place_batches(say)
    advance = setup.make_step(batches, frozen=head_only, optimizer=optimizer)
    state, pending = setup.make_state(weights), None
    losses: list[float] = []
    try:
        with StopSignals() as stop, progress(steps, "learning rates", "step") as bar:
            say(f"Trying {steps} learning rates from {lowest:g} to {highest:g}.")
            for rate, arguments in zip(rates, batches.arguments(0, steps), strict=True):
                lr_scale = sharding.put(np.float32(rate), setup.everywhere)
                state, figures = advance(dataclasses.replace(state, lr_scale=lr_scale), *arguments)
                if pending is not None:  # the step before: the device never waits
                    losses.append(float(pending))
                pending = figures["loss"]
                bar.update(1)
                stop.check()
                if losses and has_diverged(losses):
                    break
            else:
                losses.append(float(pending))  # type: ignore[arg-type]
    except Interrupted as interruption:
        raise Interrupted(interruption.signum, "Stopped; nothing was written.") from None
    tried = rates[: len(losses)]
    end = "the loss diverged" if len(losses) < steps else "the end of the range, without divergence"
    say(f"{len(losses)} steps, up to a learning rate of {tried[-1]:.2g}: {end}.")
    return LrRange(tried.tolist(), losses, suggest(tried, losses))


def _say_suggestion(suggestion: Suggestion, command: FindLrCommand) -> None:
    config, rate = command.settings(), rounded(suggestion.valley)
    if command.head_only:
        key, optimizer = "freeze_lr", dataclasses.replace(config.optimizer, freeze_lr=rate)
    else:
        key, optimizer = "peak_lr", dataclasses.replace(config.optimizer, peak_lr=rate)
    print(
        f"Suggestion: optimizer.{key} = {rate:g}. The loss falls fastest at {suggestion.steepest:.2g} and is lowest "
        f"at {suggestion.lowest:.2g}, which is too high to train at."
    )
    options = options_for(command.config, dataclasses.replace(config, optimizer=optimizer))
    line = [python_command(), "-m", "pcam_jax.train", *options]
    print(f"\nNext:\n  {shlex.join(line)}")


def _write_table(path: Path, found: LrRange, means: list[float]) -> None:
    with atomic_write(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["learning_rate", "loss", "smoothed_loss"])
        for number, (rate, loss) in enumerate(zip(found.rates, found.losses, strict=True)):
            mean = f"{means[number]:.9g}" if number < len(means) else ""
            writer.writerow([f"{rate:.9g}", f"{loss:.9g}", mean])


if __name__ == "__main__":
    run_command(main)
