"""Resuming from every state that a crash can leave on the disk gives the run that was never interrupted."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from crash_images import CAMERA, Image

from pcam_jax.run.folder import open_run

Train = Callable[..., Any]

# all that decides a run's future and is easily forgotten in a checkpoint
EVERYTHING = {
    "data__sampling": "balanced",
    "augment__horizontal_flip": True,
    "augment__rotation_degrees": 20.0,
    "augment__brightness": 0.2,
    "augment__mixup_alpha": 0.2,
    "loss__label_smoothing": 0.05,
    "optimizer__name": "adamw",
    "optimizer__weight_decay": 0.01,
    "optimizer__schedule": "plateau",
    "optimizer__plateau_patience": 1,
    "optimizer__peak_lr": 0.02,
    "optimizer__ema_decay": 0.9,
    "train__early_stop_patience": 3,
}
OTHERS = {
    "device-resident, one cycle, averaged tail": {
        "data__placement": "device",
        "optimizer__schedule": "one_cycle",
        "optimizer__accumulate_steps": 2,
        "optimizer__swa_epochs": 2,
        "augment__vertical_flip": True,
        "loss__name": "focal",
    },
    "two stages, sgd": {
        "optimizer__name": "sgd",
        "optimizer__momentum": 0.9,
        "optimizer__schedule": "cosine",
        "optimizer__freeze_epochs": 1,
        "optimizer__layer_decay": 0.5,
        "optimizer__clip_norm": 0.5,
    },
    "plateaus and an early end": {
        # too small a step to move a weight: no epoch is better than the first, on any machine
        "model__options": {"norm": False},
        "optimizer__name": "sgd",
        "optimizer__schedule": "plateau",
        "optimizer__plateau_patience": 1,
        "optimizer__peak_lr": 1e-30,
        "optimizer__min_lr": 1e-32,
        "train__early_stop_patience": 3,
        "train__epochs": 30,
    },
    "schedule-free": {"optimizer__name": "schedule_free_adamw", "optimizer__schedule": "constant"},
    "muon in bfloat16": {
        "optimizer__name": "muon",
        "optimizer__schedule": "constant",
        "train__precision": "bfloat16",
    },
}


def kind(image: Image) -> str:
    """What was about to happen, whatever the step and the random part of a temporary name."""
    name = re.sub(r"state\.orbax-checkpoint-tmp/.*", "state.orbax-checkpoint-tmp/...", image.moment)
    return re.sub(r"\d+", "N", re.sub(r"\.[a-z0-9_]{8}\.tmp$", ".tmp", name))


def committed(run: Path) -> int:
    """Latest step whose checkpoint had its name when the copy was made, or 0."""
    folder = run / "checkpoints"
    names = os.listdir(folder) if folder.is_dir() else []
    return max((int(name) for name in names if name.isdecimal()), default=0)


def decided(run: Path) -> Any:
    """How a run ended, and what it knew of plateaus and early stopping in its last epoch."""
    opened = open_run(run)
    return opened.result, opened.checkpoints.load(opened.checkpoints.steps()[-1]).progress["control"]


def assert_resumes(train: Train, run: Path, straight: Path, moment: str, **settings: Any) -> None:
    said: list[str] = []
    latest = committed(run)
    train(run, resume=True, say=said.append, **settings)
    resumed = [int(found[1]) for line in said if (found := re.match(r"Resuming at step (\d+)", line))]
    finished = any("already finished" in line for line in said)
    assert finished or resumed == ([latest] if latest else []), (moment, said[:3])
    assert not tiny.differing_arrays(tiny.final_arrays(run), tiny.final_arrays(straight)), moment
    assert tiny.same_history(run, straight), moment
    assert decided(run) == decided(straight), moment
    left = [path.name for path in run.rglob("*.tmp")]
    assert not left or finished, (moment, left)


def test_a_crash_at_any_moment_loses_nothing(train_tiny: Train, tmp_path: Path, long: bool) -> None:
    settings = {**EVERYTHING, "checkpoint__every_steps": 2 if long else 4}
    straight = train_tiny(tmp_path / "straight", **settings).path
    with CAMERA.watching(tmp_path / "run", tmp_path / "images") as images:
        train_tiny(tmp_path / "run", **settings)
    assert not tiny.differing_arrays(tiny.final_arrays(tmp_path / "run"), tiny.final_arrays(straight))
    last_of_each_kind = {kind(image): image for image in images}
    assert len(last_of_each_kind) >= 20
    for image in images if long else last_of_each_kind.values():
        assert_resumes(train_tiny, image.folder, straight, image.moment, **settings)


@pytest.mark.parametrize("name", OTHERS)
def test_every_kind_of_run_resumes_in_mid_epoch(
    train_tiny: Train, tmp_path: Path, long: bool, name: str
) -> None:
    settings = {"train__epochs": 3, **OTHERS[name], "checkpoint__every_steps": 1, "checkpoint__keep": 99}
    straight = train_tiny(tmp_path / "straight", **settings).path
    steps = sorted(int(entry) for entry in os.listdir(straight / "checkpoints"))
    if "train__early_stop_patience" in settings:
        result, control = decided(straight)
        assert result["ended_by"] == "early_stop"
        assert control["lr_scale"] < 1
    # within an epoch, at its end, and in the last one
    for step in steps if long else (3, 6, steps[-1] - 3):
        assert step in steps
        cut = Path(shutil.copytree(straight, tmp_path / f"cut{step}"))
        (cut / "result.json").unlink()
        for later in steps:
            if later > step:
                shutil.rmtree(cut / f"checkpoints/{later}")
        assert_resumes(train_tiny, cut, straight, f"{name}, after step {step}", **settings)
