"""Who may write into a workdir: a new run, a resumed one, or nobody."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from pcam_jax.config.files import changed_settings
from pcam_jax.config.schema import Config
from pcam_jax.run.checkpoint import Checkpoint
from pcam_jax.run.folder import CONFIG, RESULT, Run, open_run, write_config
from pcam_jax.runtime.errors import UserError
from pcam_jax.runtime.files import remove_leftovers

# settings that leave every number of a run as it is
_FREE = (
    "data.store",
    "data.placement",
    "checkpoint.",
    "tracking.",
    "train.max_seconds",
    "train.nan_patience",
)


@dataclasses.dataclass(frozen=True)
class Claim:
    """What a training command found in its workdir."""

    run: Run | None
    """The run to go on with, or None to begin a new one."""
    checkpoint: Checkpoint | None
    """Where to go on from, or None to start at step 0."""
    finished: bool
    """The run has already reached its end."""
    remarks: list[str]
    """Sentences for the person."""


def claim_workdir(workdir: Path, config: Config, store_digest: str, *, resume: bool) -> Claim:
    """Decide what training may do in a folder, which the caller holds locked.

    Without ``resume`` the folder must not hold a run. With it, an empty folder starts a new run, a finished
    run is left alone, and settings that decide the numbers must be those of the run, except for more epochs
    where the schedule does not depend on their number.

    Args:
        workdir: an existing folder.
        config: what is asked for now.
        store_digest: of the data asked for now.
        resume: go on with what is there.

    Raises:
        UserError: the folder holds another run or other files, or the settings or the data have changed.
    """
    remove_leftovers(workdir)
    if not (workdir / CONFIG).is_file():
        others = sorted(entry.name for entry in workdir.iterdir() if not _is_beginning(entry))
        if others:
            raise UserError(
                f"{workdir} is not empty ({others[0]}) and holds no run: choose a new folder with --workdir."
            )
        return Claim(None, None, False, [])
    if not resume:
        raise UserError(
            f"{workdir} already holds a run: add --resume to go on with it, or choose another --workdir."
        )
    run = open_run(workdir)
    _check_same(run, config, store_digest)
    result = run.result
    if result is not None and not _can_go_on(result, run.config, config):
        return Claim(run, None, True, [f"{workdir} is already finished ({result['reason']}); nothing to do."])
    checkpoint, remarks = run.checkpoints.load_latest()
    if checkpoint is None and not remarks:
        remarks = ["No checkpoint was saved yet: starting at step 0."]
    elif checkpoint is None:
        remarks.append("No good checkpoint is left: starting at step 0.")
    if config != run.config:
        run = write_config(run, config)
    (workdir / RESULT).unlink(missing_ok=True)
    return Claim(run, checkpoint, False, remarks)


def _is_beginning(entry: Path) -> bool:
    """What a run killed before its ``config.toml`` was written may have left."""
    return entry.name in (".lock", "environment.json", "split.csv")


def _check_same(run: Run, config: Config, store_digest: str) -> None:
    before = run.config
    changes = [
        change
        for change in changed_settings(before, config)
        if not change.startswith(_FREE) and not _is_longer_training(change, before, config)
    ]
    if changes:
        raise UserError(
            f"{run.path} was started with other settings: {'; '.join(changes)}. Resume with its own settings, "
            "or choose another --workdir."
        )
    recorded = run.environment["data"]["digest"]
    if recorded != store_digest:
        raise UserError(
            f"{run.path} was trained on other data (store digest {recorded[:12]}, now {store_digest[:12]}): "
            "name its own store with --data.store, or choose another --workdir."
        )


def _can_go_on(result: dict[str, Any], before: Config, after: Config) -> bool:
    """Whether a run that has ended may be taken up again: more epochs than it did, or its time ran out."""
    ended_by = result.get("ended_by")
    return ended_by == "max_seconds" or (ended_by == "epochs" and after.train.epochs > before.train.epochs)


def _is_longer_training(change: str, before: Config, after: Config) -> bool:
    return (
        change.startswith("train.epochs ")
        and after.train.epochs > before.train.epochs
        and after.optimizer.schedule in ("constant", "plateau")
        and not after.optimizer.warmup_fraction
        and not after.optimizer.swa_epochs
    )
