"""Two training stages: a frozen body first, then everything, slower towards the stem."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import tiny

from pcam_jax.config.files import load_config
from pcam_jax.config.schema import Config, OptimizerConfig
from pcam_jax.models.registry import build_model
from pcam_jax.run.folder import open_run
from pcam_jax.training.averaging import keeps_average
from pcam_jax.training.control import Control
from pcam_jax.training.optimizer import learning_rate_factors, make_optimizer
from pcam_jax.training.state import TrainState, initial_state, to_named_arrays
from pcam_jax.training.steps import begin_stage, evaluation_weights, make_train_step

HEAD = ("dense1", "output")
DICE = np.random.default_rng(0)
IMAGES = DICE.integers(0, 256, (8, *tiny.IMAGE_SHAPE), np.uint8)
LABELS = np.arange(8, dtype=np.int32) % 2


@pytest.fixture(scope="module")
def net() -> Any:
    tiny.register()
    return build_model("tiny", image_shape=tiny.IMAGE_SHAPE, outputs=1)


@functools.cache  # one compilation for all tests of the same settings
def train(net: Any, settings: OptimizerConfig, *, frozen: bool) -> tuple[list[TrainState], Any]:
    """The states before and after each of four steps, and the optimizer."""
    config = Config(optimizer=settings)
    params, batch_stats = net.init(jax.random.key(0))
    batch_stats = jax.tree.map(lambda leaf: leaf + 0.25, batch_stats)
    optimizer = make_optimizer(settings, 100, params)
    step = jax.jit(
        make_train_step(
            net,
            optimizer,
            config,
            classes=2,
            lr_factors=learning_rate_factors(settings, net.depths(), frozen=frozen),
            train_body=not frozen,
        ),
        compiler_options={"xla_backend_optimization_level": 0},  # compiling is what takes time here
    )
    average = keeps_average(settings, batch_stats)
    ema = settings.ema_decay > 0
    states = [initial_state(params, batch_stats, optimizer.init(params), ema=ema, average=average)]
    for _ in range(4):
        states.append(step(states[-1], IMAGES, LABELS)[0])
    return states, optimizer


def changed(before: Any, after: Any) -> set[str]:
    """Modules of which some array is not the same bit for bit."""
    one, other = to_named_arrays(before), to_named_arrays(after)
    assert one.keys() == other.keys()
    return {name.split(".")[0] for name in one if one[name].tobytes() != other[name].tobytes()}


ADAMW = OptimizerConfig(name="adamw", peak_lr=0.01, weight_decay=0.1, ema_decay=0.9, schedule="constant")
SCHEDULE_FREE = OptimizerConfig(
    name="schedule_free_adamw", peak_lr=0.01, weight_decay=0.1, schedule="constant"
)
SGD = OptimizerConfig(name="sgd", peak_lr=0.01, schedule="constant")


@pytest.mark.parametrize(
    "settings",
    [
        ADAMW,
        OptimizerConfig(
            name="sgd", peak_lr=0.01, momentum=0.9, nesterov=True, clip_norm=0.1, weight_decay=0.1
        ),
        OptimizerConfig(name="muon", peak_lr=0.01, weight_decay=0.1, schedule="constant"),
        SCHEDULE_FREE,
    ],
    ids=lambda settings: settings.name,
)
def test_a_frozen_body_stands_still_bit_for_bit(net: Any, settings: OptimizerConfig) -> None:
    (before, *_, after), optimizer = train(net, settings, frozen=True)
    assert changed(before.params, after.params) == set(HEAD)
    assert changed(before.batch_stats, after.batch_stats) == set()
    if settings.ema_decay:
        assert changed(before.ema_params, after.ema_params) == set(HEAD)
        assert changed(before.ema_batch_stats, after.ema_batch_stats) == set()
    # what is evaluated, which schedule-free optimizers compute anew, stands still too
    evaluated = evaluation_weights(after, optimizer)
    assert changed(before.params, evaluated[0]) == set(HEAD)
    assert changed(before.batch_stats, evaluated[1]) == set()


def test_an_unfrozen_body_learns_with_its_statistics(net: Any) -> None:
    (before, after, *_), _ = train(net, SGD, frozen=False)
    assert changed(before.params, after.params) == {"conv1", "norm1", *HEAD}
    assert changed(before.batch_stats, after.batch_stats) == {"norm1"}


def test_each_part_learns_at_its_own_factor(net: Any) -> None:
    assert {part: set(jax.tree.leaves(depths)) for part, depths in net.depths().items()} == {
        "conv1": {1}, "norm1": {1}, "dense1": {0}, "output": {0},
    }  # fmt: skip
    (before, whole, *_), _ = train(net, SGD, frozen=False)
    (_, slowed, *_), _ = train(net, dataclasses.replace(SGD, layer_decay=0.25), frozen=False)
    moved = jax.tree.map(jnp.subtract, whole.params, before.params)
    less = jax.tree.map(jnp.subtract, slowed.params, before.params)
    for part, factor in {"conv1": 0.25, "norm1": 0.25, "dense1": 1.0, "output": 1.0}.items():
        for one, other in zip(jax.tree.leaves(moved[part]), jax.tree.leaves(less[part]), strict=True):
            np.testing.assert_allclose(other, factor * one, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet_small", ["conv1 bn1", "layer1", "layer2", "layer3", "layer4"]),
        (
            "densenet121",
            [
                "features.conv0 features.norm0",
                *(f"features.{part}{n}" for n in (1, 2, 3) for part in ("denseblock", "transition")),
                "features.denseblock4 features.norm5",
            ],
        ),
        ("efficientnet_b0", [f"features.{stage}" for stage in range(9)]),
    ],
)
def test_parts_of_a_net_are_its_stages_with_their_normalisation(name: str, expected: list[str]) -> None:
    depths = build_model(name, image_shape=(96, 96, 3), outputs=1).depths()
    for distance, parts in enumerate(reversed(expected), start=1):
        for part in parts.split():
            branch = functools.reduce(lambda tree, key: tree[key], part.split("."), depths)
            assert set(jax.tree.leaves(branch)) == {distance}
    head = depths["fc"] if "fc" in depths else depths["classifier"]
    assert set(jax.tree.leaves(head)) == {0}


def test_schedule_free_layers_average_at_their_own_pace(net: Any) -> None:
    (before, whole, *_), _ = train(net, SCHEDULE_FREE, frozen=False)
    (_, first, *_, after), _ = train(net, dataclasses.replace(SCHEDULE_FREE, layer_decay=0.25), frozen=False)
    # both the params and the sequence behind them
    for sequence in (lambda state: state.params, lambda state: state.opt_state.base):
        moved = sequence(whole)["conv1"]["kernel"] - before.params["conv1"]["kernel"]
        less = sequence(first)["conv1"]["kernel"] - before.params["conv1"]["kernel"]
        np.testing.assert_allclose(less, 0.25 * moved, rtol=1e-3, atol=1e-7)
    assert changed(before.params, after.params) == {"conv1", "norm1", *HEAD}


@pytest.mark.parametrize("settings", [ADAMW, SCHEDULE_FREE], ids=lambda settings: settings.name)
def test_a_new_stage_begins_with_a_fresh_optimizer(net: Any, settings: OptimizerConfig) -> None:
    (*_, state), optimizer = train(net, settings, frozen=True)
    begun = jax.jit(lambda state: begin_stage(state, optimizer))(state)
    assert changed(begun.opt_state, optimizer.init(begun.params)) == set()
    # what is evaluated does not jump
    for one, other in zip(
        jax.tree.leaves(evaluation_weights(state, optimizer)),
        jax.tree.leaves(evaluation_weights(begun, optimizer)),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


# ---------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def staged_run(
    tmp_path_factory: pytest.TempPathFactory, train_tiny: Callable[..., Any]
) -> tuple[Path, list[str]]:
    """A run of two stages that averages in both ways, all its checkpoints kept, and what it said."""
    said: list[str] = []
    path = tmp_path_factory.mktemp("staged") / "run"
    train_tiny(path, say=said.append, **STAGED)
    return path, said


STAGED: dict[str, Any] = {
    "train__epochs": 4,
    "optimizer__freeze_epochs": 2,
    "optimizer__freeze_lr": 0.02,
    "optimizer__peak_lr": 0.004,
    "optimizer__schedule": "one_cycle",
    "optimizer__layer_decay": 0.5,
    "optimizer__swa_epochs": 2,
    "optimizer__ema_decay": 0.9,
    "checkpoint__keep": 10,
}


def test_history_and_console_show_two_stages(staged_run: tuple[Path, list[str]]) -> None:
    path, said = staged_run
    history = pd.read_csv(path / "history.csv")
    assert history["stage"].tolist() == [1, 1, 2, 2]
    stages = [line for line in said if line.startswith("Stage")]
    head, whole = 4 * 5 * 5 * 8 + 8 + 8 + 1, 4 * 27 + 4 + 8
    assert stages == [
        f"Stage 1, epochs 1 to 2: trains the head alone, {head} of {head + whole} parameters, learning rate up to "
        "0.02.",
        f"Stage 2, epochs 3 to 4: trains everything, {head + whole} of {head + whole} parameters, learning rate up "
        "to 0.004.",
    ]
    assert [re.findall(r"stage \d", line)[0] for line in said if line.startswith("epoch")] == [
        "stage 1", "stage 1", "stage 2", "stage 2",
    ]  # fmt: skip
    # each stage's cycle falls to its end
    assert history["learning_rate"][1] < 0.002
    assert history["learning_rate"][3] < history["learning_rate"][2] <= 0.004


def test_the_body_of_a_run_moves_in_the_second_stage_only(staged_run: tuple[Path, list[str]]) -> None:
    run = open_run(staged_run[0])
    steps = [int(row["step"]) for row in run.history()]
    arrays = [run.checkpoints.load(step).arrays for step in steps]
    first, second, third = (
        {
            name: a
            for name, a in saved.items()
            if name.startswith(("params.conv1", "params.norm1", "batch_stats."))
        }
        for saved in arrays[:3]
    )
    assert tiny.differing_arrays(first, second) == []
    assert tiny.differing_arrays(second, third) == sorted(first)
    # Adam's count belongs to the stage
    counts = [saved[name] for saved in arrays for name in saved if name.endswith("count") and "opt" in name]
    assert [int(count) for count in counts] == [steps[0], 0, steps[2] - steps[1], steps[3] - steps[1]]


@pytest.mark.parametrize("epochs_done", [1, 2, 3])
def test_a_run_resumed_around_the_stages_is_the_same(
    staged_run: tuple[Path, list[str]],
    epochs_done: int,
    tmp_path: Path,
    tiny_store: Path,
    train_tiny: Callable[..., Any],
) -> None:
    whole, path = staged_run[0], tmp_path / "run"
    shutil.copytree(whole, path)
    run = open_run(path)
    last = int(run.history()[epochs_done - 1]["step"])
    for step in run.checkpoints.steps():
        if step > last:
            run.checkpoints.remove(step)
    (path / "result.json").unlink()
    train_tiny(path, resume=True, **STAGED)
    assert tiny.same_history(whole, path)
    assert tiny.differing_arrays(tiny.final_arrays(whole), tiny.final_arrays(path)) == []


def row(epoch: int, value: float) -> dict[str, float]:
    return {"epoch": epoch, "step": epoch, "validation_loss": value, "validation_auroc": value}


def test_frozen_epochs_never_stop_a_run_that_has_others() -> None:
    config = load_config(
        None, {"train.epochs": 6, "train.early_stop_patience": 1, "optimizer.freeze_epochs": 3}
    )
    control = Control()
    for epoch in (1, 2, 3):
        control = control.after_epoch(row(epoch, 1.0), config)
        assert not control.stop_reason
    assert control.after_epoch(row(4, 0.5), config).stop_reason == ""
    assert control.after_epoch(row(4, 1.0), config).stop_reason
    # a run of frozen epochs alone does stop
    alone = load_config(
        None, {"train.epochs": 3, "train.early_stop_patience": 1, "optimizer.freeze_epochs": 3}
    )
    assert Control().after_epoch(row(1, 1.0), alone).after_epoch(row(2, 1.0), alone).stop_reason


def test_the_second_stage_begins_with_the_whole_learning_rate() -> None:
    overrides = {
        "optimizer.schedule": "plateau",
        "optimizer.plateau_patience": 1,
        "optimizer.freeze_epochs": 3,
    }
    config = load_config(None, {**overrides, "train.epochs": 6})
    control = Control()
    scales = []
    for epoch in range(1, 7):
        control = control.after_epoch(row(epoch, 1.0), config)
        scales.append(control.lr_scale)
    assert scales == [1.0, 0.5, 1.0, 1.0, 0.5, 0.25]
    assert json.dumps(control.to_dict())
