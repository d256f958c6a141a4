"""A network, a store and settings small enough that a whole training run takes a second.

As a script it is a verb with the tiny network known: ``python tests/tiny.py train ...``, and after
``--largest-file BYTES`` one whose files may not grow beyond that, after ``--devices N`` one on N devices.
"""

from __future__ import annotations

import importlib
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

IMAGE_SHAPE = (12, 12, 3)
FIGURES_OF_TIME = ("seconds", "images_per_second", "wait_share")
"""Columns of history.csv that two equal runs need not share."""


def cut(run: Path, target: Path, step: int) -> Path:
    """A run as it was when a step had just been saved."""
    shutil.copytree(run, target)
    (target / "result.json").unlink()
    for folder in (target / "checkpoints").iterdir():
        if int(folder.name) > step:
            shutil.rmtree(folder)
    return target


def tiny_net(
    *, image_shape: Any, outputs: int, dropout: float = 0.2, norm: bool = True, dtype: Any = None
) -> Any:
    """A convolution, batch normalisation, dropout and two dense layers."""
    from pcam_jax.models.stack import BatchNormSpec, ConvSpec, DenseSpec, DropoutSpec, MaxPoolSpec, Stack

    body = [ConvSpec(4, 3), *([BatchNormSpec()] if norm else []), MaxPoolSpec()]
    head = [*([DropoutSpec(dropout)] if dropout else []), DenseSpec(8)]
    return Stack(body, head, image_shape=image_shape, outputs=outputs, dtype=dtype)


def register() -> None:
    """Make the network known under the name ``tiny``."""
    from pcam_jax.models import registry

    registry._FACTORIES["tiny"] = tiny_net


def make_tiny_store(path: Path, labelled: int = 60, test: int = 14, classes: int = 2, seed: int = 0) -> Path:
    """Noisy images whose mean colour tells the class, none too easily; six slides."""
    from pcam_jax.data.store import write_store

    rng = np.random.default_rng(seed)
    count = labelled + test
    labels = np.arange(count) % classes
    noise = rng.normal(128, 40, (count, *IMAGE_SHAPE))
    tint = 14.0 * (labels - (classes - 1) / 2)
    images = np.clip(noise + tint[:, None, None, None] * np.array([1.0, -1.0, 0.5]), 0, 255).astype(np.uint8)
    index = pd.DataFrame(
        {
            "id": [f"patch{number:04d}" for number in range(count)],
            "label": np.where(np.arange(count) < labelled, labels, -1),
            "group": [f"slide{number // 2 % 6}" for number in range(count)],
            "split": ["train"] * labelled + ["test"] * test,
        }
    )
    index.loc[index["split"] == "train", "split"] = ""
    write_store(path, images, index, [f"class{number}" for number in range(classes)])
    return path


def settings(store: Path, **overrides: Any) -> dict[str, Any]:
    """Dotted settings of a tiny run; double underscores stand for dots."""
    return {
        "data.store": str(store),
        "data.validation_fraction": 0.3,
        "data.split_by": "example",
        "model.name": "tiny",
        "optimizer.schedule": "constant",
        "train.epochs": 3,
        "train.batch_size": 8,
        "train.eval_batch_size": 8,
        "checkpoint.every_seconds": 0.0,
        "tracking.tensorboard": False,
        **{name.replace("__", "."): value for name, value in overrides.items()},
    }


def as_options(values: dict[str, Any]) -> list[str]:
    """Dotted settings as command-line options."""
    options = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            table, _, key = flag.rpartition(".")
            options.append(f"--{flag}" if value else f"--{table}.no-{key}")
        else:
            options += [f"--{flag}", str(value)]
    return options


def same_history(one: Path, other: Path) -> bool:
    """Whether two runs' histories agree in every figure that is not a matter of time."""
    left, right = (pd.read_csv(run / "history.csv", dtype=str) for run in (one, other))
    return bool(left.drop(columns=[*FIGURES_OF_TIME]).equals(right.drop(columns=[*FIGURES_OF_TIME])))


def final_arrays(run: Path) -> dict[str, np.ndarray]:
    """Everything in the latest checkpoint of a run."""
    from pcam_jax.run.folder import open_run

    checkpoints = open_run(run).checkpoints
    return checkpoints.load(checkpoints.steps()[-1]).arrays


def differing_arrays(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> list[str]:
    """Names of the arrays that are not equal bit for bit."""
    names = sorted(set(one) | set(other))
    return [
        name
        for name in names
        if name not in one or name not in other or one[name].tobytes() != other[name].tobytes()
    ]


if __name__ == "__main__":
    while sys.argv[1].startswith("--"):
        number = int(sys.argv[2])
        if sys.argv[1] == "--largest-file":
            resource.setrlimit(resource.RLIMIT_FSIZE, (number, resource.RLIM_INFINITY))
        elif sys.argv[1] == "--devices":
            importlib.import_module("jax").config.update("jax_num_cpu_devices", number)
        del sys.argv[1:3]
    from pcam_jax.runtime.command import run_command

    register()
    run_command(importlib.import_module(f"pcam_jax.{sys.argv[1]}").main, sys.argv[2:])
