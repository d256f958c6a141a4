from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pcam_jax.config.files import load_config
from pcam_jax.config.schema import Config
from pcam_jax.training.control import Control, HistoryRow


def configured(**settings: Any) -> Config:
    return load_config(None, {name.replace("__", "."): value for name, value in settings.items()})


def row(step: int, **figures: float) -> HistoryRow:
    return {"step": step, "validation_loss": 1.0, "validation_auroc": 0.5, "train_accuracy": 0.5, **figures}


def follow(config: Config, losses: list[float], name: str = "validation_loss") -> list[Control]:
    control, seen = Control(), []
    for step, value in enumerate(losses, start=1):
        control = control.after_epoch(row(step, **{name: value}), config)
        seen.append(control)
    return seen


def test_the_best_step_is_the_first_of_equals() -> None:
    seen = follow(configured(), [0.9, 0.7, 0.7, 0.8])
    assert [control.best_step for control in seen] == [1, 2, 2, 2]
    assert seen[-1].best_value == 0.7
    assert seen[-1].epochs_without_improvement == 2
    assert [control.epoch for control in seen] == [1, 2, 3, 4]


def test_auroc_is_better_when_higher() -> None:
    config = configured(train__monitor="validation_auroc")
    seen = follow(config, [0.6, 0.8, 0.7], "validation_auroc")
    assert seen[-1].best_step == 2


def test_what_is_not_a_number_never_improves_and_is_improved_upon() -> None:
    seen = follow(configured(), [math.nan, math.nan, 0.9, math.nan])
    assert [control.best_step for control in seen] == [1, 1, 3, 3]
    assert seen[-1].best_value == 0.9


def test_early_stopping_counts_epochs_without_improvement() -> None:
    config = configured(train__early_stop_patience=2)
    seen = follow(config, [0.9, 1.0, 0.8, 0.8, 0.9])
    assert [bool(control.stop_reason) for control in seen] == [False, False, False, False, True]
    assert seen[-1].stop_reason == "validation_loss did not improve for 2 epochs"
    assert not any(control.stop_reason for control in follow(configured(), [0.1] * 50))


def test_early_stopping_does_not_count_the_first_epochs() -> None:
    config = configured(train__early_stop_patience=2, train__early_stop_from_epoch=3)
    seen = follow(config, [0.7, 0.8, 0.8, 0.8, 0.8])
    assert [bool(control.stop_reason) for control in seen] == [False, False, False, False, True]
    assert seen[-1].best_step == seen[0].best_step
    assert not any(control.stop_reason for control in follow(config, [0.7, 0.8, 0.8, 0.8, 0.6]))


def test_a_plateau_halves_the_rate_and_counts_anew_down_to_the_floor() -> None:
    config = configured(
        optimizer__schedule="plateau",
        optimizer__peak_lr=0.1,
        optimizer__min_lr=0.02,
        optimizer__plateau_patience=2,
        optimizer__plateau_factor=0.5,
    )
    seen = follow(config, [1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.6, 0.6, 0.6, 0.6])
    scales = [control.lr_scale for control in seen]
    # an improvement at epoch 6 starts the count again; the third halving would pass the floor of 0.2
    assert scales == pytest.approx([1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.25, 0.2, 0.2, 0.2])


@pytest.mark.parametrize(
    ("metric", "values"),
    [("validation_loss", [0.5, 0.6]), ("validation_auroc", [0.9, 0.8]), ("train_accuracy", [0.9, 0.8])],
)
def test_the_plateau_may_follow_another_figure_than_the_monitor(metric: str, values: list[float]) -> None:
    config = configured(
        optimizer__schedule="plateau", optimizer__plateau_patience=1, optimizer__plateau_metric=metric
    )
    assert [control.lr_scale for control in follow(config, values, metric)] == [1.0, 0.5]


def test_other_schedules_have_no_plateau() -> None:
    assert follow(configured(), [1.0] * 20)[-1].lr_scale == 1.0


FIGURES = st.floats(allow_nan=True, allow_infinity=False)


@given(st.lists(FIGURES, min_size=1, max_size=12), st.integers(0, 11))
def test_a_control_that_went_through_json_decides_the_same(values: list[float], cut: int) -> None:
    config = configured(
        optimizer__schedule="plateau", optimizer__plateau_patience=2, train__early_stop_patience=3
    )
    straight = follow(config, values)
    control = Control()
    for step, value in enumerate(values, start=1):
        if step == cut:
            control = Control.from_dict(json.loads(json.dumps(control.to_dict())))
        control = control.after_epoch(row(step, validation_loss=value), config)
    assert repr(control) == repr(straight[-1])
