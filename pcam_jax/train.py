"""Train a network on a store: ``python -m pcam_jax.train [CONFIG.toml] [--table.key VALUE ...]``.

The order of operations, which the loop below follows from top to bottom:

1. settings, data, split and network are checked before anything is written;
2. the workdir is locked, and either begun or resumed from its latest good checkpoint;
3. each epoch: train to its last step, evaluate, decide (best, plateau, early stop), record, save;
4. the end is written to ``result.json`` and said, with the commands that come next.

A step is dispatched before the figures of the one before it are looked at, so the device never waits.
Several processes run the same loop on their shares of each batch; the first one alone touches the workdir.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from pcam_jax.config.rules import check_config
from pcam_jax.config.schema import Config
from pcam_jax.data.named import open_named_store
from pcam_jax.data.split import assign_splits, split_warning
from pcam_jax.inference.forward import Forward
from pcam_jax.inference.starting_weights import StartingWeights, check_same_start, load_starting_weights
from pcam_jax.metrics.links import mean_log_loss, most_probable
from pcam_jax.metrics.ranking import macro_auroc
from pcam_jax.metrics.recalibration import apply_temperature
from pcam_jax.models.registry import model_names
from pcam_jax.models.window_dot import describe_precision
from pcam_jax.report.console import ending, epoch_line, introduction, layer_table, stage_line
from pcam_jax.report.figures import write_training_curves
from pcam_jax.run.checkpoint import Checkpoint, Checkpoints
from pcam_jax.run.claim import Claim, claim_workdir
from pcam_jax.run.command_line import ConfigCommand, parse_config_command
from pcam_jax.run.folder import CHECKPOINTS, HISTORY, Run, create_run, describe_environment, write_result
from pcam_jax.run.history import write_history
from pcam_jax.run.tracking import Tracker, make_trackers
from pcam_jax.runtime import accelerator, distributed, sharding
from pcam_jax.runtime.command import run_command
from pcam_jax.runtime.errors import Interrupted, UserError
from pcam_jax.runtime.files import folder_lock
from pcam_jax.runtime.progress import progress
from pcam_jax.runtime.signals import StopSignals
from pcam_jax.training.control import Control, HistoryRow
from pcam_jax.training.setup import Setup
from pcam_jax.training.state import TrainState, from_named_arrays, snapshot, to_named_arrays
from pcam_jax.training.steps import StepFigures, evaluation_weights

Say = Callable[[str], None]
OnEpoch = Callable[[HistoryRow], None]


@dataclasses.dataclass(frozen=True)
class TrainCommand(ConfigCommand):
    """Train a network and write a run."""

    workdir: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder of the run; by default runs/<recipe>-<time>."""
    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    """Go on with the run in workdir, from its latest checkpoint."""


def main(argv: list[str]) -> None:
    """Parse the command line and train."""
    command = parse_command(argv)
    recipe = command.config.stem if command.config else "default"
    run_training(command.settings(), command.workdir or _default_workdir(recipe), resume=command.resume)


def parse_command(argv: list[str]) -> TrainCommand:
    """The command line on top of the file it names, on top of the defaults.

    Raises:
        UserError: the file is missing or wrong.
        SystemExit: an option is unknown or does not parse (2), or help was asked for (0).
    """
    return parse_config_command(
        TrainCommand,
        argv,
        prog="python -m pcam_jax.train",
        description=f"Train a network on a store. Networks: {', '.join(model_names())}.",
    )


def run_training(
    config: Config,
    workdir: str | Path | None = None,
    *,
    resume: bool = False,
    say: Say = print,
    on_epoch: OnEpoch | None = None,
) -> Run:
    """Train, evaluating after each epoch, and write everything into a run folder.

    Args:
        config: from `pcam_jax.load_config`.
        workdir: the run folder, which must be new or empty unless ``resume``; by default ``runs/<net>-<time>``.
        resume: go on from the latest checkpoint; a run that was interrupted and resumed equals, bit for bit on
            the same devices, one that was not.
        say: takes each line meant for a person.
        on_epoch: takes the figures of each epoch once they are saved, in every process; what it raises ends the
            run, which can be resumed.

    Returns:
        The run, with its best checkpoint on disk.

    Raises:
        UserError: settings, data or workdir are not usable, or training cannot go on.
        Interrupted: SIGINT or SIGTERM came; everything up to the current step is saved.
    """
    check_config(config)
    accelerator.configure(config.train.deterministic, config.train.cpu_devices)
    store = open_named_store(config.data.store)
    split = assign_splits(store.index, config.data)
    folder = Path(workdir) if workdir is not None else _default_workdir(config.model.name)
    with StopSignals() as stop, contextlib.ExitStack() as held:
        say = say if distributed.is_first() else _say_nothing
        setup = Setup(config, store, split)
        claim, starting = distributed.on_first(lambda: _claim(setup, folder, resume, held, say)) or (
            None,
            None,
        )
        if distributed.share(claim is not None and claim.finished):
            return Run(folder)
        training = _Training(setup, folder, stop, say, on_epoch)
        training.begin(claim.checkpoint if claim is not None else None, starting)
        training.go_on()
    return Run(folder)


def _claim(
    setup: Setup, folder: Path, resume: bool, held: contextlib.ExitStack, say: Say
) -> tuple[Claim, StartingWeights | None]:
    """Take the workdir for this process, read the weights to start from, and write a new run's first files."""
    store, starting = setup.store, None
    folder.mkdir(parents=True, exist_ok=True)
    held.enter_context(folder_lock(folder, "a training run"))
    claim = claim_workdir(folder, setup.config, store.digest, resume=resume)
    for remark in claim.remarks:
        say(remark)
    devices = accelerator.device_summary()
    if claim.checkpoint is not None and claim.run is not None and claim.run.environment["devices"] != devices:
        say(
            f"This run began on {claim.run.environment['devices']} and goes on on {devices}: its numbers will not "
            "be, bit for bit, those of a run that was never interrupted."
        )
    if setup.config.model.init_from and claim.checkpoint is None and not claim.finished:
        starting = load_starting_weights(setup.config, setup.net)
        if claim.run is not None:
            check_same_start(claim.run, starting)
    if claim.run is None:
        environment = describe_environment(store, setup.split, devices, setup.net.param_count)
        if starting is not None:
            environment["init_from"] = starting.record
        splits = store.index.assign(split=setup.split)[["id", "split"]]
        create_run(folder, setup.config, environment, splits)
    return claim, starting


class _Training:
    """One run in progress: the loop, and what it carries from step to step."""

    def __init__(
        self, setup: Setup, folder: Path, stop: StopSignals, say: Say, on_epoch: OnEpoch | None
    ) -> None:
        self.on_epoch = on_epoch
        self.setup, self.config, self.store = setup, setup.config, setup.store
        self.folder, self.say = folder, say
        self.stop = distributed.SharedStop(stop, setup.mesh)
        self.forward = Forward(setup.net, setup.config.model.normalization, setup.mesh)
        self.control, self.history = Control(), list[HistoryRow]()
        self.step = 0
        self.trackers: list[Tracker] = []
        self.checkpoints: Checkpoints | None = None  # of the first process

    # ---- beginning

    def begin(self, checkpoint: Checkpoint | None, starting: StartingWeights | None) -> None:
        """Make the state of step 0, or take up a checkpoint's; the first process has read either."""
        setup = self.setup
        self.started = self.last_save = time.monotonic()
        saved = distributed.share(checkpoint.progress if checkpoint else None)
        self._make_state(checkpoint, starting)
        if saved is not None:
            self.control = Control.from_dict(saved["control"])
            self.history, self.step = saved["history"], saved["step"]
            self.say(f"Resuming at step {self.step} of {setup.total_steps}.")
        self.first_epoch = self.control.epoch
        self.batches = setup.place_batches(self.say)
        self.average = setup.make_average(self.batches)
        self.begin_epoch, self.begin_stage = setup.make_epoch_starts()
        if distributed.is_first():
            write_history(self.folder / HISTORY, self.history)
            self.checkpoints = Checkpoints(self.folder / CHECKPOINTS, self.config.checkpoint.keep)
            self.trackers = make_trackers(self.config, self.folder, self.step)
        self.say(layer_table(setup.net.summary()))
        self.say(
            introduction(
                net=f"{setup.net.name}: {setup.net.param_count:,} parameters, "
                f"{describe_precision(self.config.train.precision)}, "
                f"{accelerator.device_summary()}",
                store=self.store.path,
                split=setup.split,
                home=self.batches.home,
                warning=split_warning(self.store.index, self.config.data),
                run=self.folder,
            )
        )
        for sentence in starting.sentences if starting else ():
            self.say(sentence)

    def _make_state(self, checkpoint: Checkpoint | None, starting: StartingWeights | None) -> None:
        weights = distributed.share_arrays(to_named_arrays(starting.weights) if starting else None)
        if weights is not None:
            like = jax.eval_shape(self.setup.net.init, jax.random.key(0))
            weights = from_named_arrays(like, weights)
        self.state: TrainState = self.setup.make_state(weights)
        arrays = distributed.share_arrays(checkpoint.arrays if checkpoint else None)
        if arrays is not None:
            self.state = sharding.put(from_named_arrays(self.state, arrays), self.setup.everywhere)

    @functools.lru_cache(maxsize=1)  # noqa: B019  (one instance a process, which lives as long as the run)
    def _step(self, frozen: bool) -> Callable[..., tuple[TrainState, StepFigures]]:
        return self.setup.make_step(self.batches, frozen=frozen)

    # ---- the loop

    def go_on(self) -> None:
        """Train to the end, or until a signal."""
        try:
            while not (ended_by := self._ended_by()):
                self._begin_stage()
                self._train_epoch()
                self._end_epoch(*self._evaluate())
            self._finish(ended_by)
        except Interrupted as interruption:
            self._save()
            self._close()
            raise Interrupted(
                interruption.signum,
                f"Stopped at step {self.step} of {self.setup.total_steps}; everything is saved. Go on with --resume.",
            ) from None
        finally:
            self._close()

    def _begin_stage(self) -> None:
        """Say which of two stages begins, or is taken up, with the next epoch."""
        frozen, epochs = self.setup.frozen_epochs, self.config.train.epochs
        if not frozen or self.control.epoch not in (self.first_epoch, frozen):
            return
        stage, settings = self.setup.stage(self.control.epoch + 1), self.config.optimizer
        self.say(
            stage_line(
                stage,
                (1, frozen) if stage == 1 else (frozen + 1, epochs),
                (self.setup.head_params(), self.setup.net.param_count),
                (settings.freeze_lr or settings.peak_lr) if stage == 1 else settings.peak_lr,
            )
        )

    def _train_epoch(self) -> None:
        """Dispatch the steps left of the current epoch."""
        order = self.setup.order
        last = order.epoch_end_step(self.control.epoch + 1)
        self.epoch_started, self.epoch_images = time.monotonic(), (last - self.step) * order.batch_size
        every = self.config.checkpoint.every_steps
        advance = self._step(self.control.epoch < self.setup.frozen_epochs)
        pending: StepFigures | None = None
        with progress(self.epoch_images, f"epoch {self.control.epoch + 1}", "img") as bar:
            for batch in self.batches.arguments(self.step, last):
                self.state, figures = advance(self.state, *batch)
                self.step += 1
                if pending is not None:
                    self._watch(pending, bar)
                pending = figures
                bar.update(order.batch_size)
                self.stop.check()
                if self.checkpoints is not None:
                    self.checkpoints.check()
                if self.step < last and ((every and self.step % every == 0) or self._save_is_due()):
                    self._save()
            if pending is not None:
                self._watch(pending, bar)

    def _watch(self, figures: StepFigures, bar: Any) -> None:
        """Look at the step before the one just dispatched."""
        skipped = int(figures["skipped_in_row"])
        if skipped >= self.config.train.nan_patience:
            raise UserError(
                f"{skipped} steps in a row had a non-finite loss or gradient and were skipped: try a lower "
                'optimizer.peak_lr, optimizer.clip_norm = 1, or train.precision = "float32"; the last good '
                f"checkpoint is in {self.folder / CHECKPOINTS}."
            )
        waited = self.batches.waited_seconds / max(time.monotonic() - self.epoch_started, 1e-9)
        bar.set_postfix(loss=f"{float(figures['loss']):.4f}", waiting=f"{waited:.1%}", refresh=False)

    def _evaluate(self) -> tuple[HistoryRow, bool]:
        """Figures of the epoch just trained, on all validation examples, and whether the run has collapsed."""
        # taken before the evaluation, whose time is not training time
        sums = jax.device_get((self.state.loss_sum, self.state.correct_sum, self.state.example_count))
        loss_sum, correct, count = (float(value) for value in sums)
        seconds = max(time.monotonic() - self.epoch_started, 1e-9)
        waited = self.batches.waited_seconds
        positions, epoch = self.setup.validation_positions, self.control.epoch + 1
        averaged = self.average.after_epoch(self.state, epoch, self.stop)
        logits = self.forward.logits(
            evaluation_weights(averaged, self.setup.optimizer),
            self.forward.loader(self.store, positions, self.config.train.eval_batch_size),
            self.stop,
        )
        # only now: what a signal interrupts is done again on --resume, and must find the state as it was
        self.state = averaged
        labels = self.store.labels[positions]
        probs = apply_temperature(logits, 1.0)
        row = {
            "epoch": epoch,
            "stage": self.setup.stage(epoch),
            "step": self.step,
            "train_loss": loss_sum / max(count, 1.0),
            "train_accuracy": correct / max(count, 1.0),
            "validation_loss": mean_log_loss(logits, labels),
            "validation_accuracy": float(np.mean(most_probable(logits) == labels)),
            "validation_auroc": macro_auroc(labels, probs),
            "learning_rate": float(self.setup.optimizer.schedule(self.step - 1)) * self.control.lr_scale,
            "skipped_steps": int(self.state.skipped),
            "seconds": round(seconds, 3),
            "images_per_second": round(self.epoch_images / seconds, 1),
            "wait_share": round(waited / seconds, 4),
        }
        return row, bool(np.ptp(probs, axis=0).max() < 1e-3)

    def _end_epoch(self, row: HistoryRow, collapsed: bool) -> None:
        """Decide, save, record."""
        control = dataclasses.replace(self.control.after_epoch(row, self.config), collapsed=collapsed)
        # one decision for all: hosts of another make may round the figures differently
        self.control = Control.from_dict(distributed.share(control.to_dict()))
        self.history.append(row)
        self.state = self.begin_epoch(self.state, np.float32(self.control.lr_scale))
        if self.control.epoch == self.config.optimizer.freeze_epochs:
            self.state = self.begin_stage(self.state)
        self._save(replace=True)
        if distributed.is_first():
            write_history(self.folder / HISTORY, self.history)
        for tracker in self.trackers:
            tracker.log(int(row["step"]), {name: row[name] for name in row if name not in ("epoch", "step")})
        best, staged = self.control.best_step == row["step"], self.setup.frozen_epochs > 0
        self.say(epoch_line(row, best=best, staged=staged))
        if self.on_epoch is not None:
            self.on_epoch(row)

    def _ended_by(self) -> str:
        """The name of what ends the run now, or empty."""
        if self.control.epoch >= self.config.train.epochs:
            return "epochs"
        if self.control.stop_reason:
            return "early_stop"
        limit = self.config.train.max_seconds
        spent = (
            limit > 0 and self.control.epoch > self.first_epoch and time.monotonic() - self.started >= limit
        )
        return "max_seconds" if limit and distributed.share(spent) else ""

    # ---- saving and ending

    def _save_is_due(self) -> bool:
        every = self.config.checkpoint.every_seconds
        return bool(every) and time.monotonic() - self.last_save >= every

    def _save(self, *, replace: bool = False) -> None:
        """Hand a copy of everything that decides the future to the background writer.

        Args:
            replace: a checkpoint of this step, made before the evaluation, is out of date.
        """
        if self.checkpoints is not None:
            values = {"control": self.control.to_dict(), "history": self.history}
            self.checkpoints.save(
                self.step, snapshot(self.state), values, self.control.best_step, replace=replace
            )
        self.last_save = time.monotonic()

    def _close(self) -> None:
        """Make everything durable; again is no harm."""
        while self.trackers:
            self.trackers.pop().close()
        if self.checkpoints is not None:
            self.checkpoints.close()

    def _finish(self, ended_by: str) -> None:
        """Make everything durable, then say which step is best, why it ended and what comes next."""
        self._close()
        if not distributed.is_first():
            return
        reason = {
            "epochs": f"all {self.config.train.epochs} epochs done",
            "early_stop": self.control.stop_reason,
            "max_seconds": f"train.max_seconds ({self.config.train.max_seconds:g}) reached; --resume goes on",
        }[ended_by]
        write_training_curves(self.folder / "curves.png", self.history)
        write_result(self.folder, self.control, self.config.train.monitor, ended_by, reason)
        self.say(
            ending(
                next(row for row in self.history if row["step"] == self.control.best_step),
                self.store.labels[self.setup.validation_positions],
                reason=reason,
                monitor=self.config.train.monitor,
                collapsed=self.control.collapsed,
                run=self.folder,
                store=self.config.data.store,
                has_test=bool(np.any(self.setup.split == "test")),
            )
        )


def _say_nothing(line: str) -> None:
    """The voice of the processes other than the first."""


def _default_workdir(recipe: str) -> Path:
    return Path("runs") / f"{recipe}-{datetime.now():%Y%m%d-%H%M%S}"


if __name__ == "__main__":
    run_command(main)
