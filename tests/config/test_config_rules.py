"""What values may be, beyond their types."""

from __future__ import annotations

import math

import pytest

from pcam_jax.config.files import load_config
from pcam_jax.runtime.errors import UserError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train.epochs", 0), ("train.batch_size", -4), ("train.eval_batch_size", 0), ("checkpoint.keep", 0),
        ("optimizer.peak_lr", 0.0), ("optimizer.peak_lr", math.inf), ("optimizer.peak_lr", math.nan),
        ("optimizer.min_lr", -1.0), ("optimizer.min_lr", 1.0), ("optimizer.accumulate_steps", 5),
        ("optimizer.ema_decay", 1.0), ("data.validation_fraction", 1.0), ("data.train_fraction", 0.0),
        ("data.train_fraction", 1.5), ("data.train_fraction", math.nan), ("data.folds", 1), ("data.folds", -2),
        ("data.store", ""), ("augment.erase_area", 1.2), ("augment.blur_probability", -0.1), ("train.seed", -1),
    ],
)  # fmt: skip
def test_value_outside_its_range_is_named(name: str, value: object) -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, {name: value})
    assert name in str(caught.value)


def test_fold_must_be_one_of_the_folds() -> None:
    assert load_config(None, {"data.folds": 5, "data.fold": 4}).data.fold == 4
    with pytest.raises(UserError, match=r"data\.fold is 5"):
        load_config(None, {"data.folds": 5, "data.fold": 5})
