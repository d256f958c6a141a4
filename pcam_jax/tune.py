"""Search over recipes: ``python -m pcam_jax.tune CONFIG.toml --space space.toml --trials 50``.

Each trial is a run of `train` with other settings; those that lag behind are ended early. The study lies in a
database, so that a stopped search goes on and several machines can share one.
"""

from __future__ import annotations

import dataclasses
import random
import shutil
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from pcam_jax.config.files import config_to_dict
from pcam_jax.config.schema import Config
from pcam_jax.report.study import write_study_report
from pcam_jax.run.command_line import ConfigCommand, parse_config_command
from pcam_jax.run.search_space import SearchSpace, read_space
from pcam_jax.runtime.command import python_command, run_command
from pcam_jax.runtime.errors import Interrupted, UserError, require
from pcam_jax.runtime.files import folder_lock
from pcam_jax.runtime.signals import StopSignals
from pcam_jax.training.control import HistoryRow

OBJECTIVE = "validation_auroc"
_UNFINISHED = "unfinished"
_TRIES = 10
_MADE_BY_ANOTHER = ("already exists", "unique", "duplicate", "locked", "deadlock")
_HOPELESS = 3  # failures in a row, without any success, that end a search


@dataclasses.dataclass(frozen=True)
class TuneCommand(ConfigCommand):
    """Search for better settings."""

    space: Annotated[Path | None, tyro.conf.arg(metavar="SPACE.toml")] = None
    """What to vary: tables like [optimizer.peak_lr] with low and high (log = true, step), or choices."""
    trials: int = 20
    """Trials that the study shall have in the end, those of earlier commands and other machines included."""
    folder: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Where runs and report go; by default runs/tune-<recipe>."""
    storage: str = ""
    """Address of the study's database, such as postgresql://user@host/name; by default SQLite in the folder."""
    study: str = ""
    """Name of the study in the database; by default tune-<recipe>."""
    pruner: Literal["median", "hyperband", "none"] = "median"
    """End trials early that are worse than the median at the same epoch, or by Hyperband, or never."""
    search_seed: int | None = None
    """Seed of the search, for one that is run by one process; without it each search differs."""
    keep: Literal["best", "all"] = "best"
    """Which trials' run folders stay on the disk."""


def main(argv: list[str]) -> None:
    """Parse the command line, search, report."""
    command = parse_config_command(
        TuneCommand,
        argv,
        prog="python -m pcam_jax.tune",
        description="Search over settings; options of train fix what the search leaves alone.",
    )
    if command.space is None:
        raise UserError(
            "Name what to vary: --space space.toml, with a table like [optimizer.peak_lr] low, high."
        )
    if command.trials < 1:
        raise UserError(f"--trials is {command.trials}: it must be at least 1.")
    base = command.settings()
    recipe = command.config.stem if command.config else "default"
    folder = command.folder or Path("runs") / f"tune-{recipe}"
    space = read_space(command.space, base)
    with StopSignals() as stop:
        search = _Search(command, base, space, folder, recipe)
        try:
            search.run(stop)
        finally:
            best = search.report()
    if best is None:
        raise UserError(f"No trial of {folder} has finished: look at the failures in {folder / 'report.md'}.")
    print(f"Wrote {folder / 'report.md'}, {folder / 'trials.csv'} and {folder / 'best.toml'}.")
    print(f"Next: {python_command()} -m pcam_jax.train {folder / 'best.toml'} --workdir runs/{recipe}-tuned")


class _Search:
    """A study and what is needed to add trials to it."""

    def __init__(
        self, command: TuneCommand, base: Config, space: SearchSpace, folder: Path, recipe: str
    ) -> None:
        optuna = self.optuna = require("optuna", extra="tune")
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.command, self.base, self.space, self.folder = command, base, space, folder
        folder.mkdir(parents=True, exist_ok=True)
        storage = command.storage or f"sqlite:///{(folder / 'study.db').absolute()}"
        pruner: Any = optuna.pruners.NopPruner()
        if command.pruner == "median":
            pruner = optuna.pruners.MedianPruner(n_startup_trials=4)
        elif command.pruner == "hyperband":
            pruner = optuna.pruners.HyperbandPruner(min_resource=1, max_resource=base.train.epochs)
        sampler = optuna.samplers.TPESampler(seed=command.search_seed)
        self.study = open_study(storage, command.study or f"tune-{recipe}", sampler, pruner)
        known = self.study.user_attrs.get("space")
        if known is not None and known != space.to_json():
            raise UserError(
                f"{folder} searches another space: choose another --folder (or --study), or give the same space."
            )
        self.study.set_user_attr("space", space.to_json())

    def finished(self) -> list[Any]:
        """Trials that ended on their own, well or badly."""
        running = (self.optuna.trial.TrialState.RUNNING, self.optuna.trial.TrialState.WAITING)
        trials = self.study.get_trials(deepcopy=False)
        return [t for t in trials if t.state not in running and not t.user_attrs.get(_UNFINISHED)]

    def run(self, stop: StopSignals) -> None:
        """Add trials until there are as many as asked for."""
        self._take_up_killed()
        failures = 0
        while len(self.finished()) < self.command.trials:
            stop.check()
            failures = 0 if self._one_trial() else failures + 1
            if failures >= _HOPELESS and not self._best():
                raise UserError(
                    f"The first {failures} trials failed, the last one: {self.finished()[-1].user_attrs.get('error')}"
                )

    def _take_up_killed(self) -> None:
        """Let the trials begin again that were killed in this folder; others may be running elsewhere."""
        states = self.optuna.trial.TrialState
        for trial in self.study.get_trials(deepcopy=False, states=(states.RUNNING,)):
            name = _name(trial)
            if _is_abandoned(self.folder / name):
                self.study.tell(trial.number, state=states.FAIL)
                self.study.enqueue_trial(trial.params)
                self._remove(name)

    def _one_trial(self) -> bool:
        from pcam_jax.train import run_training

        trial = self.study.ask()
        trial.set_user_attr(_UNFINISHED, True)  # stays where the process is killed
        name = _name(trial)
        values = self.space.suggest(trial)
        states = self.optuna.trial.TrialState
        lines: list[str] = []

        def on_epoch(row: HistoryRow) -> None:
            trial.report(row[OBJECTIVE], int(row["epoch"]))
            if trial.should_prune():
                raise self.optuna.TrialPruned

        try:
            config = self.space.config(self.base, values)
            run = run_training(config, self.folder / name, say=lines.append, on_epoch=on_epoch)
            best_step = run.result["best_step"] if run.result else -1
            history = run.history()
            value = next(row[OBJECTIVE] for row in history if int(row["step"]) == best_step)
        except self.optuna.TrialPruned:
            self._end(trial, state=states.PRUNED)
            self._say(name, values, "ended early")
            self._remove(name)
            return True
        except (Interrupted, KeyboardInterrupt):
            self.study.tell(trial, state=states.FAIL)
            self.study.enqueue_trial(trial.params)  # the next command begins with it
            self._remove(name)
            raise
        except UserError as error:
            trial.set_user_attr("error", str(error))
            self._end(trial, state=states.FAIL)
            self._say(name, values, f"failed: {error}")
            self._remove(name)
            return False
        before = self._best()
        trial.set_user_attr("config", config_to_dict(config))
        self._end(trial, values=value)
        better = before is None or value > before.value
        self._say(name, values, f"{OBJECTIVE} {value:.4f}{' (best so far)' if better else ''}")
        if not better:
            self._remove(name)
        elif before is not None:
            self._remove(_name(before))
        return True

    def _end(self, trial: Any, **outcome: Any) -> None:
        trial.set_user_attr(_UNFINISHED, False)
        self.study.tell(trial, **outcome)

    def _best(self) -> Any:
        complete = (self.optuna.trial.TrialState.COMPLETE,)
        trials = self.study.get_trials(deepcopy=False, states=complete)
        return max(trials, key=lambda trial: trial.value, default=None)

    def _remove(self, name: str) -> None:
        if self.command.keep == "best":
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def _say(self, name: str, values: dict[str, Any], outcome: str) -> None:
        settings = ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                             for key, value in values.items())  # fmt: skip
        print(f"{name}: {settings}: {outcome}", flush=True)

    def report(self) -> Any:
        """Write the report as far as the study has come; returns the best trial or None."""
        best = self._best()
        write_study_report(self.folder, self.study, self.finished(), best, OBJECTIVE)
        return best


def open_study(storage: str, name: str, sampler: Any = None, pruner: Any = None) -> Any:
    """Open a study of Optuna's, or begin it; also where several processes begin it at the same moment.

    Args:
        storage: address of the database.
        name: of the study.
        sampler: Optuna's.
        pruner: Optuna's.

    Raises:
        UserError: the database cannot be opened.
    """
    import optuna

    for left in reversed(range(_TRIES)):
        try:
            return optuna.create_study(
                study_name=name,
                storage=storage,
                direction="maximize",
                sampler=sampler,
                pruner=pruner,
                load_if_exists=True,
            )
        except Exception as error:  # SQLAlchemy's, or a missing driver of the database
            if isinstance(error.__cause__, ModuleNotFoundError):
                raise UserError(
                    f"The study's database needs the package {error.__cause__.name}, which is not installed: "
                    "install it (PostgreSQL's is psycopg[binary]), or leave --storage out."
                ) from None
            # each makes the tables unless they are there, and finds then that another one has
            if not left or not any(sign in str(error).lower() for sign in _MADE_BY_ANOTHER):
                raise UserError(
                    f"The study's database cannot be opened ({_first_line(error)}): check --storage."
                ) from None
            time.sleep(random.uniform(0.1, 0.5))
    raise AssertionError


def _name(trial: Any) -> str:
    return f"trial-{trial.number:04d}"


def _is_abandoned(run: Path) -> bool:
    """Whether a run folder is there in which nobody trains."""
    if not run.is_dir():
        return False
    try:
        with folder_lock(run, "a search"):
            return True
    except UserError:
        return False


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


if __name__ == "__main__":
    run_command(main)
