from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny

from pcam_jax.data.store import open_store
from pcam_jax.inference.averaging import load_predictors, mean_probabilities
from pcam_jax.runtime.errors import UserError


@pytest.fixture(scope="module")
def other_run(tmp_path_factory: pytest.TempPathFactory, train_tiny: Callable[..., object]) -> Path:
    path = tmp_path_factory.mktemp("other") / "run"
    train_tiny(path, train__seed=1)
    return path


def test_an_ensemble_is_the_mean_of_its_members(tiny_run: Path, other_run: Path, tiny_store: Path) -> None:
    store, positions = open_store(tiny_store), np.arange(20)
    predictors = load_predictors([tiny_run, other_run, tiny_run])
    members = [predictor.predict(store, positions).astype(np.float64) for predictor in predictors]
    mean = mean_probabilities(predictors, store, positions)
    np.testing.assert_allclose(mean, (2 * members[0] + members[1]) / 3, rtol=1e-6)
    assert not np.allclose(members[0], members[1])
    [alone] = load_predictors([tiny_run])
    np.testing.assert_array_equal(
        mean_probabilities([alone], store, positions), members[0].astype(np.float32)
    )


def test_runs_that_answer_other_questions_are_refused(
    tiny_run: Path, tmp_path: Path, train_tiny: Callable[..., object]
) -> None:
    store = tiny.make_tiny_store(tmp_path / "store", classes=3)
    train_tiny(tmp_path / "run", store=store, model__head="softmax", train__epochs=1)
    with pytest.raises(UserError, match=r"cannot be averaged with .*: it tells class0, class1, class2 apart"):
        load_predictors([tiny_run, tmp_path / "run"])
