from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from pcam_jax.data.store import Store, open_store
from pcam_jax.inference import predictor as module
from pcam_jax.inference.predictor import Predictor, batch_shares
from pcam_jax.models.preprocess import normalize
from pcam_jax.run.folder import open_run
from pcam_jax.run.operating_point import OperatingPoint, write_operating_point
from pcam_jax.runtime.errors import UserError


@pytest.fixture(scope="module")
def predictor(tiny_run: Path) -> Predictor:
    return Predictor.load(tiny_run)


@pytest.fixture(scope="module")
def store(tiny_store: Path) -> Store:
    return open_store(tiny_store)


def test_probabilities_are_the_best_checkpoints(predictor: Predictor, tiny_run: Path, store: Store) -> None:
    images = store.gather(np.arange(10))
    arrays = open_run(tiny_run).best_checkpoint()[0].arrays
    params, stats = predictor.net.init(jax.random.key(0))
    fill = lambda tree, prefix: jax.tree_util.tree_map_with_path(  # noqa: E731
        lambda path, _: arrays[prefix + jax.tree_util.keystr(path, simple=True, separator=".")], tree
    )
    logits, _ = predictor.net.apply(fill(params, "params."), fill(stats, "batch_stats."), normalize(images))
    expected = 1 / (1 + np.exp(-np.asarray(logits, np.float64)[:, 0]))
    found = predictor(images)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_images_in_memory_and_in_a_store_give_the_same(predictor: Predictor, store: Store) -> None:
    positions = np.array([3, 60, 7, 7, 0])
    np.testing.assert_array_equal(predictor(store.gather(positions)), predictor.predict(store, positions))
    np.testing.assert_array_equal(predictor(store.image(3)), predictor(store.gather(positions))[:1])


def test_padding_order_and_neighbours_change_no_bit(
    predictor: Predictor, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = store.gather(np.arange(40))
    straight = predictor(images)
    order = np.random.default_rng(0).permutation(40)
    np.testing.assert_array_equal(predictor(images[order]), straight[order])
    for count in (1, 5, 39):
        np.testing.assert_array_equal(predictor(images[:count]), straight[:count])
    monkeypatch.setattr(predictor, "batch_size", 16)
    np.testing.assert_allclose(predictor(images), straight, rtol=1e-5)


def test_no_images_give_no_probabilities(predictor: Predictor) -> None:
    assert predictor(np.zeros((0, *tiny.IMAGE_SHAPE), np.uint8)).shape == (0,)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 12, 12, 3), np.float32),
        np.zeros((2, 12, 11, 3), np.uint8),
        np.zeros((12, 12), np.uint8),
        np.zeros((2, 3, 12, 12), np.uint8),
    ],
)
def test_other_images_are_refused(predictor: Predictor, images: np.ndarray) -> None:
    with pytest.raises(UserError, match=r"the model takes uint8 \[N, 12, 12, 3\]"):
        predictor(images)


def turned(images: np.ndarray) -> list[np.ndarray]:
    """The eight symmetries of square images, by rotation and reflection rather than by flips and transposition."""
    return [
        np.ascontiguousarray(np.rot90(side, turns, (1, 2)))
        for side, turns in itertools.product((images, images[:, :, ::-1]), range(4))
    ]


def test_d4_averages_the_eight_symmetries_and_sees_none_of_them(
    predictor: Predictor, tiny_run: Path, store: Store
) -> None:
    images = store.gather(np.arange(12))
    averaged = Predictor.load(tiny_run, tta="d4")
    found = averaged(images)
    expected = np.mean([predictor(view).astype(np.float64) for view in turned(images)], axis=0)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert np.abs(found - predictor(images)).max() > 1e-4
    for view in turned(images):
        np.testing.assert_allclose(averaged(view), found, rtol=1e-6)


def test_the_symmetries_are_eight_different_ones_and_oblong_images_have_four() -> None:
    image = np.arange(2 * 4 * 4 * 3, dtype=np.float32).reshape(2, 4, 4, 3)
    views = [np.asarray(module._turn(image, symmetry)) for symmetry in range(8)]
    assert len({view.tobytes() for view in views}) == 8
    assert {view.tobytes() for view in views} == {view.tobytes() for view in turned(image)}
    oblong = np.zeros((1, 4, 6, 3), np.float32)
    assert all(module._turn(oblong, symmetry).shape == oblong.shape for symmetry in range(4))


def test_temperature_calibrates_and_keeps_the_order(tiny_run: Path, tmp_path: Path, store: Store) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    plain = Predictor.load(run)
    images = store.gather(np.arange(20))
    write_operating_point(run, dataclasses.replace(OperatingPoint(), temperature=4.0, threshold=0.3))
    cool = Predictor.load(run)
    logit = lambda probs: np.log(probs / (1 - probs))  # noqa: E731
    np.testing.assert_allclose(
        logit(cool(images).astype(np.float64)),
        logit(plain(images).astype(np.float64)) / 4,
        rtol=1e-3,
        atol=1e-5,
    )
    assert cool.operating_point.threshold == 0.3


def test_averaged_weights_are_used_where_the_run_averages(
    tmp_path: Path, train_tiny: Callable[..., object], store: Store
) -> None:
    train_tiny(tmp_path / "run", optimizer__ema_decay=0.9, train__epochs=1)
    arrays = open_run(tmp_path / "run").best_checkpoint()[0].arrays
    predictor = Predictor.load(tmp_path / "run")
    used = np.asarray(predictor.weights[0]["output"]["kernel"])
    np.testing.assert_array_equal(used, arrays["ema_params.output.kernel"])
    assert not np.array_equal(used, arrays["params.output.kernel"])


def test_three_classes_give_a_probability_each(tmp_path: Path, train_tiny: Callable[..., object]) -> None:
    store = tiny.make_tiny_store(tmp_path / "store", classes=3)
    train_tiny(tmp_path / "run", store=store, model__head="softmax", train__epochs=1)
    probs = Predictor.load(tmp_path / "run", tta="d4").predict(open_store(store), np.arange(9))
    assert probs.shape == (9, 3)
    np.testing.assert_allclose(probs.sum(1), 1, rtol=1e-6)


def test_a_damaged_best_checkpoint_is_a_remark(tiny_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    best = open_run(run).best_checkpoint()[0].step
    (run / f"checkpoints/{best}/progress.json").write_text("")
    assert any("using another" in remark for remark in Predictor.load(run).remarks)


@given(st.integers(0, 1000), st.integers(1, 50), st.integers(1, 9))
def test_shares_are_whole_batches_and_cover_everything_once(count: int, batch_size: int, parts: int) -> None:
    shares = batch_shares(count, batch_size, parts)
    assert len(shares) == parts
    assert [row for first, last in shares for row in range(first, last)] == list(range(count))
    assert all(first % batch_size == 0 or first == count for first, _ in shares)
    batches = [-(-(last - first) // batch_size) for first, last in shares]
    assert max(batches) - min(batches) <= 1
