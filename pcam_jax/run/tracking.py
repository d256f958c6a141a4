"""Where figures go while a run goes on, behind one small interface."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any, Protocol

from pcam_jax.config.files import config_to_dict
from pcam_jax.config.schema import Config
from pcam_jax.runtime.errors import require
from pcam_jax.runtime.files import write_text_atomic

WANDB_ID = "wandb-id.txt"


class Tracker(Protocol):
    """Takes figures by name at a step."""

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Record figures at a step."""

    def close(self) -> None:
        """Write what is pending."""


def make_trackers(config: Config, workdir: Path, start_step: int) -> list[Tracker]:
    """The trackers the configuration asks for.

    Args:
        config: its ``tracking`` table decides.
        workdir: the run folder.
        start_step: step of a resumed run; later records of the interrupted one are superseded.

    Raises:
        UserError: an optional package is not installed.
    """
    trackers: list[Tracker] = []
    if config.tracking.tensorboard:
        trackers.append(TensorBoardTracker(workdir / "tensorboard", start_step))
    if config.tracking.wandb:
        trackers.append(WandbTracker(config, workdir, start_step))
    return trackers


class TensorBoardTracker:
    """TensorBoard event files, written without TensorFlow."""

    def __init__(self, folder: Path, start_step: int) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=start_step or None, flush_secs=30)

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Record figures at a step."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is pending."""
        self._writer.close()


class WandbTracker:
    """Weights & Biases; ``WANDB_MODE=offline`` keeps everything in the run folder until `wandb sync` sends it.

    A resumed run goes on under the id of the one that was interrupted, which lies in the run folder. Steps are a
    figure of their own there, since wandb's own count refuses to go back to a checkpoint.
    """

    def __init__(self, config: Config, workdir: Path, start_step: int) -> None:
        wandb = require("wandb", extra="wandb")
        os.environ.setdefault("WANDB_SILENT", "true")
        identity = workdir / WANDB_ID
        if start_step and identity.is_file():
            run_id = identity.read_text(encoding="utf-8").strip()
        else:
            run_id = secrets.token_hex(8)
            write_text_atomic(identity, f"{run_id}\n")
        self._run: Any = wandb.init(
            project=config.tracking.wandb_project,
            name=workdir.name,
            dir=str(workdir),
            config=config_to_dict(config),
            id=run_id,
            resume="allow",
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Record figures at a step."""
        self._run.log({"step": step, **figures})

    def close(self) -> None:
        """Write what is pending."""
        self._run.finish()
