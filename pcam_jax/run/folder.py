"""The run folder: everything that training leaves, and all that later commands need."""

from __future__ import annotations

import dataclasses
import json
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pcam_jax.config.files import config_to_toml, load_config
from pcam_jax.config.schema import Config
from pcam_jax.data.store import Store
from pcam_jax.run.checkpoint import Checkpoint, CheckpointError, Checkpoints
from pcam_jax.run.history import read_history
from pcam_jax.runtime.errors import UserError
from pcam_jax.runtime.files import atomic_write, write_json_atomic, write_text_atomic
from pcam_jax.training.control import Control, HistoryRow

CONFIG, ENVIRONMENT, SPLIT, HISTORY, RESULT, CHECKPOINTS = (
    "config.toml",
    "environment.json",
    "split.csv",
    "history.csv",
    "result.json",
    "checkpoints",
)
_PACKAGES = ("pcam-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pandas")


@dataclasses.dataclass(frozen=True)
class Run:
    """A run folder that exists.

    ``config.toml`` says what was asked, ``environment.json`` what ran it on which data, ``split.csv`` which
    example was on which side, ``history.csv`` what each epoch gave, ``result.json`` how it ended,
    ``checkpoints/`` the weights.
    """

    path: Path

    @cached_property
    def config(self) -> Config:
        """The resolved configuration."""
        return load_config(self.path / CONFIG)

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Versions, command, device and data of the run."""
        return _read_json(self.path / ENVIRONMENT)

    @property
    def checkpoints(self) -> Checkpoints:
        """Its checkpoints."""
        return Checkpoints(self.path / CHECKPOINTS, self.config.checkpoint.keep)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, by label."""
        return tuple(self.environment["data"]["class_names"])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, 3) of the images it was trained on."""
        height, width, channels = self.environment["data"]["image_shape"]
        return height, width, channels

    @property
    def result(self) -> dict[str, Any] | None:
        """How the run ended, or None while it has not."""
        return _read_json(self.path / RESULT) if (self.path / RESULT).is_file() else None

    def history(self) -> list[HistoryRow]:
        """Figures of each epoch so far."""
        return read_history(self.path / HISTORY)

    def split(self) -> pd.DataFrame:
        """Columns ``id`` and ``split``, in the order of the store it was trained on."""
        return pd.read_csv(self.path / SPLIT, dtype=str, keep_default_na=False)

    def positions(self, store: Store, split: str) -> np.ndarray:
        """Where in a store the examples of one of the run's splits lie.

        Args:
            store: the store the run was trained on, or another with the same ids.
            split: ``train``, ``validation`` or ``test``.

        Returns:
            ``[n] int64`` positions, in the order of ``split.csv``.

        Raises:
            UserError: the split is empty, or the store lacks some of its examples.
        """
        table = self.split()
        wanted = table.loc[table["split"] == split, "id"].to_numpy(dtype=str)
        if not len(wanted):
            raise UserError(f"The run {self.path} has no examples in the split {split!r}.")
        found = pd.Index(store.ids).get_indexer(pd.Index(wanted))
        missing = wanted[found < 0]
        if len(missing):
            raise UserError(
                f"The store {store.path} lacks {len(missing)} of the {split} examples of {self.path} "
                f"({missing[0]} first): name the store it was trained on with --data.store."
            )
        return found.astype(np.int64)

    def best_checkpoint(self) -> tuple[Checkpoint, list[str]]:
        """The best checkpoint by the run's monitored figure, or else the latest good one.

        Returns:
            The checkpoint, and a sentence for each thing that was not as it should be.

        Raises:
            UserError: there is no usable checkpoint.
        """
        checkpoints = self.checkpoints
        available = checkpoints.steps()
        if not available:
            raise UserError(
                f"The run {self.path} has no checkpoint yet: let `python -m pcam_jax.train --resume` go on."
            )
        complaints: list[str] = []
        by_merit = self._steps_by_merit(checkpoints, complaints)
        ranked = [step for step in by_merit if step in available]
        others = [step for step in reversed(available) if step not in ranked]
        for step in ranked + others:
            try:
                return checkpoints.load(step), complaints
            except CheckpointError as error:
                complaints.append(f"{error}; using another")
        raise UserError(f"No checkpoint of {self.path} can be read: {complaints[0]}.")

    def _steps_by_merit(self, checkpoints: Checkpoints, complaints: list[str]) -> list[int]:
        """Evaluated steps, the best first, earlier ones first among equals."""
        monitor = self.config.train.monitor
        sign = 1.0 if monitor.endswith("loss") else -1.0
        try:
            measured = [(int(row["step"]), row[monitor]) for row in self.history()]
        except (UserError, KeyError, ValueError):
            complaints.append(f"{self.path / HISTORY} is damaged; using the figures in the checkpoints")
            measured = [(int(row["step"]), row[monitor]) for row in checkpoints.latest_history()]
        merit = [float("inf") if np.isnan(value) else sign * value for _, value in measured]
        return [measured[i][0] for i in np.argsort(merit, kind="stable")]


def open_run(path: str | Path) -> Run:
    """A run folder made by training.

    Raises:
        UserError: there is none at ``path``.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(
            f"There is no run {folder}: make one with `python -m pcam_jax.train --workdir {folder}`."
        )
    for name in (CONFIG, ENVIRONMENT, SPLIT):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is not a run made by `python -m pcam_jax.train`: it has no {name}.")
    return Run(folder)


def create_run(path: Path, config: Config, environment: dict[str, Any], split: pd.DataFrame) -> Run:
    """Write the first files of a run; ``config.toml`` comes last, so that a folder with it is whole."""
    write_json_atomic(path / ENVIRONMENT, environment)
    write_split(path / SPLIT, split)
    write_text_atomic(path / CONFIG, config_to_toml(config))
    return Run(path)


def write_split(path: Path, split: pd.DataFrame) -> None:
    """Write the columns ``id`` and ``split``."""
    with atomic_write(path) as file:
        split[["id", "split"]].to_csv(file, index=False, lineterminator="\n")


def write_config(run: Run, config: Config) -> Run:
    """Replace the run's configuration (more epochs, another place of the store)."""
    write_text_atomic(run.path / CONFIG, config_to_toml(config))
    return Run(run.path)


def write_result(path: Path, control: Control, monitor: str, ended_by: str, reason: str) -> None:
    """Record how a run ended: ``ended_by`` epochs, early_stop or max_seconds, and ``reason`` in words."""
    write_json_atomic(
        path / RESULT,
        {
            "reason": reason,
            "ended_by": ended_by,
            "epochs": control.epoch,
            "best_step": control.best_step,
            "monitor": monitor,
            "best_value": control.best_value,
            "collapsed": control.collapsed,
        },
    )


def describe_environment(store: Store, split: np.ndarray, devices: str, params: int) -> dict[str, Any]:
    """What ran, with which versions, on which data: the content of ``environment.json``.

    Args:
        store: the data.
        split: ``[N]`` names of each example's split.
        devices: the devices in words.
        params: number of trainable parameters.
    """
    labelled = store.labels >= 0
    counts = {
        name: np.bincount(store.labels[(split == name) & labelled], minlength=len(store.class_names)).tolist()
        for name in ("train", "validation")
    }
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "pcam_jax.train", *sys.argv[1:]]),
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": devices,
        "packages": {name: _version(name) for name in _PACKAGES},
        "params": params,
        "data": {
            "store": str(store.path),
            "digest": store.digest,
            "image_shape": list(store.image_shape),
            "class_names": list(store.class_names),
            "examples_by_class": counts,
            "groups": len(set(store.groups) - {""}),
            "prepared": {
                key: value
                for key, value in store.manifest.source.items()
                if key in ("reader", "size", "fit", "edges")
            },
        },
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """Commit of the source tree this package runs from, marked if it has changes; empty outside one."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): the run is damaged.") from None
