"""Heat maps: what must hold for any net, and where evidence lies for nets whose answer is known."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from pcam_jax.inference import saliency, saliency_check
from pcam_jax.inference.predictor import Predictor
from pcam_jax.inference.saliency import (
    Saliency,
    central_side,
    class_score,
    map_row,
    pixel_heat,
    share_inside,
    upsampling_matrices,
)
from pcam_jax.models.registry import build_model, model_names
from pcam_jax.run.operating_point import OperatingPoint
from pcam_jax.runtime.errors import UserError

SIDES = {"idc_cnn": 50, "melanoma_v1": 500, "melanoma_v2": 500, "melanoma_v3": 500}
ONE_OF_EACH_KIND = (
    "pcam_model3",
    "pcam_cnn3",
    "idc_cnn",
    "resnet18",
    "efficientnet_b0",
    "p4m_cnn",
)


def registered(name):
    side = SIDES.get(name, 96)
    return build_model(name, image_shape=(side, side, 3), outputs=2 if name == "idc_cnn" else 1)


@pytest.fixture(scope="module")
def brightness_net():
    """A net of positive weights only, so that what is bright speaks for class 1, wherever it is."""
    tiny.register()
    net = build_model("tiny", image_shape=tiny.IMAGE_SHAPE, outputs=1, norm=False, dropout=0.0)
    params, batch_stats = net.init(jax.random.key(0))
    params = jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.02), params)
    predictor = Predictor(net, (params, batch_stats), "unit", ("dark", "bright"), OperatingPoint())
    return Saliency(predictor, batch_size=4)


@pytest.fixture(scope="module")
def trained(tiny_run):
    return Saliency(Predictor.load(tiny_run), batch_size=4, path_steps=64)


def noise(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *tiny.IMAGE_SHAPE), dtype=np.uint8)


def marked(value, background, row=6, column=3, side=3):
    image = np.full((1, *tiny.IMAGE_SHAPE), background, np.uint8)
    image[:, row : row + side, column : column + side] = value
    return image


def hottest(heat):
    return np.unravel_index(heat[0].argmax(), heat[0].shape)


def test_evidence_lies_where_it_was_put(brightness_net):
    inside = {(row, column) for row in range(6, 9) for column in range(3, 6)}
    assert hottest(brightness_net.grad_cam(marked(255, 20), np.array([1]))) in inside
    # what is darker than glass speaks against brightness, and so for the other class
    dark = marked(0, 230)
    assert hottest(brightness_net.heat("integrated_gradients", dark, np.array([0]))) in inside
    assert not brightness_net.heat("integrated_gradients", dark, np.array([1])).any()


def test_a_net_that_flattens_is_asked_cell_by_cell(brightness_net):
    """Brightness counts on the left only: Grad-CAM's mean over the map would heat what is bright on the right too."""
    net, (params, batch_stats) = brightness_net._predictor.net, brightness_net._predictor.weights
    kernel = params["dense1"]["kernel"].reshape(5, 5, 4, 8)
    left = {**params, "dense1": {**params["dense1"], "kernel": kernel.at[:, 2:].set(0).reshape(100, 8)}}
    predictor = Predictor(net, (left, batch_stats), "unit", ("dark", "bright"), OperatingPoint())
    both = np.maximum(marked(255, 20, row=1, column=1), marked(255, 20, row=8, column=8))
    heat = Saliency(predictor).grad_cam(both, np.array([1]))
    assert heat[0, 2, 2] == heat.max() > 0
    assert not heat[0, :, 8:].any()


def test_on_the_map_that_a_net_averages_it_is_grad_cam(monkeypatch):
    monkeypatch.setattr(saliency, "FEWEST_CELLS", 1)  # the last map of all
    net = build_model("resnet_small", image_shape=(48, 48, 3), outputs=1)
    weights = net.init(jax.random.key(0))
    cams = Saliency(Predictor(net, weights, "unit", ("normal", "tumour"), OperatingPoint()), batch_size=2)
    images = np.random.default_rng(0).integers(0, 256, (2, 48, 48, 3), dtype=np.uint8)
    features = net.features(*weights, jnp.asarray(images, jnp.float32) / 255)
    target = int(net.classify(*weights, features).sum() > 0)  # the class that has evidence
    slope = (2 * target - 1) * jax.grad(lambda maps: net.classify(*weights, maps).sum())(features)
    by_channel = jnp.mean(slope, axis=(1, 2), keepdims=True)
    maps = jnp.sum(by_channel * features, axis=-1)
    rows, columns = upsampling_matrices(net, map_row(net))
    expected = np.maximum(np.einsum("Hh,nhw,Ww->nHW", rows, maps, columns), 0)
    assert expected.max() > 0
    found = cams.grad_cam(images, np.array([target, target]))
    np.testing.assert_allclose(found, expected, atol=1e-4 * expected.max())


def test_attributions_add_up_to_the_score_above_that_of_glass(trained):
    images, targets = noise(6), np.array([1, 0, 1, 0, 1, 1])
    attributions = trained.integrated_gradients(images, targets)
    glass = trained.scores(np.full_like(images, 255), targets)
    risen = trained.scores(images, targets) - glass
    np.testing.assert_allclose(attributions.sum(axis=(1, 2)), risen, atol=0.02 * np.abs(risen).max())
    white = trained.integrated_gradients(np.full_like(images[:1], 255), np.array([1]))
    np.testing.assert_allclose(white, 0, atol=1e-6)


def test_targets_oppose_each_other_and_batches_change_nothing(trained):
    images = noise(6)
    ones, zeros = np.ones(6, int), np.zeros(6, int)
    np.testing.assert_allclose(trained.scores(images, ones), -trained.scores(images, zeros), rtol=1e-6)
    together = trained.grad_cam(images, ones)
    assert together.shape == (6, *tiny.IMAGE_SHAPE[:2])
    assert together.min() >= 0
    alone = np.concatenate([trained.grad_cam(images[i : i + 1], ones[:1]) for i in range(6)])
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-6)


def test_score_of_two_units_is_their_log_odds():
    logits = jnp.array([[1.0, 3.0], [0.5, -2.0]])
    np.testing.assert_allclose(class_score(logits, jnp.array([1, 0])), [2.0, 2.5])
    three = jnp.array([[1.0, 3.0, 4.0]])
    np.testing.assert_allclose(class_score(three, jnp.array([1])), [3.0])
    np.testing.assert_allclose(class_score(jnp.array([[2.0], [2.0]]), jnp.array([1, 0])), [2.0, -2.0])


@pytest.mark.parametrize(
    ("images", "targets"),
    [
        (noise(2)[:, :5], [1, 1]),
        (noise(2) / 255, [1, 1]),
        (noise(0), []),
        (noise(2), [1]),
        (noise(2), [1, 2]),
        (noise(2), [-1, 0]),
    ],
)
def test_what_cannot_be_explained_is_refused(trained, images, targets):
    with pytest.raises(UserError, match="explain"):
        trained.heat("grad_cam", images, np.array(targets, int))


def test_unknown_method(trained):
    with pytest.raises(UserError, match="Unknown method 'guess'"):
        trained.heat("guess", noise(1), np.array([1]))


@pytest.mark.parametrize("name", model_names())
def test_every_net_has_a_map_that_is_put_in_its_place(name):
    net = registered(name)
    row = map_row(net)
    cells = net.summary()[row].output_shape
    assert min(cells[:2]) >= 10
    rows, columns = upsampling_matrices(net, row)
    assert rows.shape == (net.image_shape[0], cells[0])
    assert columns.shape == (net.image_shape[1], cells[1])
    np.testing.assert_allclose(rows.sum(axis=1), 1)
    middle = rows @ np.arange(cells[0])  # where each pixel looks: evenly, the image's middle in the map's
    np.testing.assert_allclose(middle[[0, -1]].sum(), cells[0] - 1, atol=1e-9)
    assert np.all(np.diff(middle) >= 0)


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_every_kind_of_net_can_be_tapped(name):
    net = registered(name)
    row = map_row(net)
    params, batch_stats = jax.eval_shape(net.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((2, *net.image_shape), jnp.float32)

    def gradient(params, batch_stats, images):
        def score(offset):
            logits, activation = net.tapped(params, batch_stats, images, row, offset)
            return jnp.sum(logits), activation

        return jax.grad(score, has_aux=True)(jnp.zeros((2, *net.summary()[row].output_shape)))

    slopes, activation = jax.eval_shape(gradient, params, batch_stats, images)
    assert slopes.shape == activation.shape == (2, *net.summary()[row].output_shape)


def test_tapping_changes_nothing_and_its_slope_is_the_maps(brightness_net):
    net, weights = brightness_net._predictor.net, brightness_net._predictor.weights
    last = len(net.map_sizes(*net.image_shape[:2])) - 1
    zeros = jnp.zeros((2, *net.summary()[last].output_shape))

    @jax.jit
    def compare(weights, x):
        features = net.features(*weights, x)
        by_tap = jax.grad(lambda offset: net.tapped(*weights, x, last, offset)[0].sum())(zeros)
        by_features = jax.grad(lambda maps: net.classify(*weights, maps).sum())(features)
        return (
            *net.tapped(*weights, x, last, zeros),
            net.apply(*weights, x)[0],
            features,
            by_tap,
            by_features,
        )

    logits, tapped, plain, features, by_tap, by_features = compare(
        weights, jnp.asarray(noise(2), jnp.float32) / 255
    )
    np.testing.assert_allclose(logits, plain, rtol=1e-6)
    np.testing.assert_allclose(tapped, features, rtol=1e-6)
    np.testing.assert_allclose(by_tap, by_features, rtol=1e-6)


def test_a_valid_net_is_not_stretched():
    """The Keras nets look at 96 pixels with 20 cells 4 pixels apart, which leave a margin."""
    rows, _ = upsampling_matrices(registered("pcam_model1"), map_row(registered("pcam_model1")))
    place = rows @ np.arange(20)
    np.testing.assert_allclose(np.diff(place)[20:70], 1 / 4)


def test_share_inside_the_central_square():
    heat = np.zeros((3, 12, 12), np.float32)
    heat[0, 4:8, 4:8] = 1
    heat[1] = 1
    np.testing.assert_allclose(share_inside(heat, 4), [1, 16 / 144, np.nan])
    assert central_side((96, 96, 3)) == 32
    assert central_side((50, 50, 3)) is None


def test_heat_of_pixels_drops_what_speaks_against():
    attributions = np.zeros((1, 9, 9))
    attributions[0, 4, 4] = -1
    assert not pixel_heat(attributions).any()
    assert hottest(pixel_heat(-attributions)) == (4, 4)


# ------------------------------------------------------------------------------------------- checks


def test_the_hottest_tenth_is_taken_and_level_pixels_are_drawn():
    heat = np.random.default_rng(0).random((3, 10, 20)).astype(np.float32)
    chosen = saliency_check.hottest_pixels(heat, np.random.default_rng(1))
    assert chosen.sum(axis=(1, 2)).tolist() == [20, 20, 20]
    for one, mask in zip(heat, chosen, strict=True):
        assert one[mask].min() > one[~mask].max()
    level = saliency_check.hottest_pixels(np.zeros((2, 10, 20)), np.random.default_rng(1))
    assert level.sum(axis=(1, 2)).tolist() == [20, 20]
    assert not np.array_equal(level[0], level[1])


def test_removing_what_matters_is_told_from_removing_anything():
    """A scorer that counts the dark in the upper rows; heat that knows it, and heat that does not."""
    counts = SimpleNamespace(
        scores=lambda images, targets, stop=None: (255.0 - images[:, :2]).sum(axis=(1, 2, 3)) / 255
    )
    images = np.random.default_rng(0).integers(0, 128, (40, 20, 20, 3), dtype=np.uint8)
    knowing = np.zeros((40, 20, 20), np.float32)
    knowing[:, :2] = 1
    found = saliency_check.check_deletion(
        counts, "grad_cam", images, np.ones(40, int), heat=knowing, removal="white"
    )
    assert found.hottest.value == pytest.approx(counts.scores(images, None).mean())
    assert found.above_moved.low > 0
    assert found.above_scattered.low > 0
    assert found.above_elsewhere.value == 0  # equal maps
    ignorant = saliency_check.check_deletion(
        counts, "grad_cam", images, np.ones(40, int), heat=1 - knowing, removal="white"
    )
    assert ignorant.above_moved.high < 0
    assert ignorant.above_scattered.high < 0


def test_white_salt_is_no_removal():
    """A scorer that looks for dark rows, and that hard edges upset: blurring asks for the rows, white for edges."""

    def score(images, targets, stop=None):
        pixels = images[..., 0].astype(float)
        edges = sum((np.abs(np.diff(pixels, axis=axis)) > 100).sum(axis=(1, 2)) for axis in (1, 2))
        return (255 - pixels[:, :2]).mean(axis=(1, 2)) - 3 * edges

    images = np.full((10, 20, 20, 3), 110, np.uint8)
    images[:, :2] = 20
    knowing = np.zeros((10, 20, 20), np.float32)
    knowing[:, :2] = 1
    below = {
        removal: saliency_check.check_deletion(
            SimpleNamespace(scores=score), "grad_cam", images, np.ones(10, int), heat=knowing, removal=removal
        )
        for removal in saliency_check.REMOVALS
    }
    assert all(found.above_moved.low > 0 for found in below.values())  # equal shapes: either filling will do
    assert below["blur"].above_scattered.low > 0
    assert below["white"].above_scattered.high < 0
    assert [found.removal for found in below.values()] == ["blur", "white"]


def test_what_is_left_of_removed_pixels():
    images = noise(3)
    assert (saliency_check.emptied(images, "white") == 255).all()
    large = np.random.default_rng(0).integers(0, 256, (2, 96, 96, 3), dtype=np.uint8)
    blurred = saliency_check.emptied(large, "blur")
    assert blurred.dtype == np.uint8
    assert blurred.std(axis=(1, 2)).max() < 5 < 60 < large.std(axis=(1, 2)).min()
    np.testing.assert_allclose(blurred.mean(axis=(1, 2)), large.mean(axis=(1, 2)), atol=2)  # colour stays


def test_pointing_game():
    masks = np.zeros((4, 8, 8), bool)
    masks[:, :4] = True
    heat = np.zeros((4, 8, 8), np.float32)
    heat[0, 0, 0] = heat[1, 7, 7] = 1
    heat[2, 0, 0], heat[2, 7, 7] = 3, 1
    found = saliency_check.check_pointing(heat, masks)
    assert found.hit_rate.value == 0.5  # the last has no heat, a miss
    assert found.chance.value == 0.5
    assert found.heat_on_target.value == pytest.approx((1 + 0 + 0.75) / 3)


TWO_DEVICES = """
import sys, numpy as np, jax
jax.config.update("jax_num_cpu_devices", 2)
sys.path.insert(0, "tests")
import tiny
tiny.register()
from pcam_jax.inference.predictor import Predictor
from pcam_jax.inference.saliency import METHODS, Saliency
saliency = Saliency(Predictor.load(sys.argv[1]), batch_size=3, path_steps=64)
images = np.load(sys.argv[2] + "/images.npy")
targets = np.arange(len(images)) % 2
np.savez(sys.argv[2] + "/heat.npz", **{name: saliency.heat(name, images, targets) for name in METHODS})
"""


def test_two_devices_agree_with_one(trained, tiny_run, tmp_path):
    images = noise(7)
    np.save(tmp_path / "images.npy", images)
    command = [sys.executable, "-W", "error", "-c", TWO_DEVICES, tiny_run, tmp_path]
    subprocess.run(command, check=True, timeout=120, cwd=Path(__file__).parents[2])
    with np.load(tmp_path / "heat.npz") as heat:
        assert set(heat) == set(saliency.METHODS)
        for method in saliency.METHODS:
            expected = trained.heat(method, images, np.arange(7) % 2)
            assert expected.max() > 0
            np.testing.assert_allclose(heat[method], expected, rtol=1e-3, atol=1e-5 * expected.max())
