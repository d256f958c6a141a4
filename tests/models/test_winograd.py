from __future__ import annotations

import functools

import float64_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pcam_jax.models import batch_parts, winograd


@pytest.mark.parametrize("tile", [2, 3, 4])
@pytest.mark.parametrize("taps", [2, 3, 4, 5])
def test_transforms_filter_exactly(tile, taps):
    matrices = winograd.transforms(tile, taps)
    rng = np.random.default_rng(0)
    signal, kernel = rng.normal(size=tile + taps - 1), rng.normal(size=taps)
    product = (matrices.kernel @ kernel) * (matrices.image @ signal)
    np.testing.assert_allclose(matrices.output.T @ product, np.correlate(signal, kernel, "valid"), atol=1e-13)


@functools.partial(jax.jit, static_argnums=(3, 4))
def output_and_gradients(x, kernel, grad, pads, tile):
    output, pull_back = jax.vjp(lambda x, kernel: winograd.conv_winograd(x, kernel, pads, tile), x, kernel)
    return output, *pull_back(grad)


# taps, tile, batch, size, pads: every overlap of windows, maps that fill no whole tile, several parts of a batch
@pytest.mark.parametrize(
    ("taps", "tile", "batch", "size", "pads"),
    [
        (2, 3, 2, (7, 9), ((0, 0), (0, 0))),
        (3, 2, 3, (6, 5), ((1, 1), (1, 1))),
        (3, 4, 2, (9, 8), ((0, 0), (0, 0))),
        (3, 4, 2, (3, 3), ((1, 1), (1, 1))),
        (4, 3, 2, (8, 7), ((1, 2), (1, 2))),
        (5, 2, 2, (9, 8), ((2, 2), (2, 2))),
        (5, 3, 2, (10, 11), ((0, 3), (2, 1))),
        (5, 4, 6, (12, 13), ((2, 2), (2, 2))),
    ],
)
def test_output_and_gradients_against_float64(monkeypatch, taps, tile, batch, size, pads):
    monkeypatch.setattr(batch_parts, "_CACHE_BYTES", 2 * 4 * 64 * 9 * 40)
    rng = np.random.default_rng(1)
    x = rng.normal(size=(batch, *size, 16)).astype(np.float32)
    kernel = rng.normal(size=(taps, taps, 16, 24)).astype(np.float32)
    rows, columns = (length + sum(pad) - taps + 1 for length, pad in zip(size, pads, strict=True))
    grad = rng.normal(size=(batch, rows, columns, 24)).astype(np.float32)
    expected = reference.conv2d(x, kernel, 1, pads, grad)
    output_and_gradients.clear_cache()
    for ours, theirs in zip(output_and_gradients(x, kernel, grad, pads, tile), expected, strict=True):
        assert ours.shape == theirs.shape
        assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs)


def test_a_large_batch_is_done_in_parts_that_divide_it():
    plan = winograd.Plan.of((12, 64, 64, 64), (3, 3, 64, 64), ((1, 1), (1, 1)), 4)
    assert plan.parts > 1
    assert 12 % plan.parts == 0
    assert winograd.Plan.of((2, 8, 8, 16), (3, 3, 16, 16), ((1, 1), (1, 1)), 4).parts == 1


def test_no_part_of_a_batch_of_small_maps_is_short_of_rows() -> None:
    plan = winograd.Plan.of((512, 6, 6, 256), (3, 3, 256, 256), ((1, 1), (1, 1)), 3)
    assert plan.parts == 8  # of 64 images, whose 4 tiles each make 256 rows


def test_tiles_are_chosen_where_they_pay():
    pads = ((1, 1), (1, 1))
    assert winograd.best_tile((32, 24, 24, 64), (3, 3, 64, 64), pads) == 4
    assert winograd.best_tile((32, 24, 24, 64), (5, 5, 64, 64), ((2, 2), (2, 2))) == 4
    # Few channels leave too little to save, and one small map does not pay for transforming a large kernel.
    assert winograd.best_tile((32, 24, 24, 3), (3, 3, 3, 64), pads) is None
    assert winograd.best_tile((1, 3, 3, 512), (3, 3, 512, 512), pads) is None
    assert winograd.best_tile((32, 24, 24, 64), (3, 5, 64, 64), pads) is None
    assert winograd.best_tile((32, 24, 24, 64), (11, 11, 64, 64), pads) is None


def test_pixels_outside_a_tile_do_not_matter_to_it():
    x = np.random.default_rng(0).normal(size=(1, 12, 12, 16)).astype(np.float32)
    kernel = np.random.default_rng(1).normal(size=(3, 3, 16, 16)).astype(np.float32)
    spoilt = x.copy()
    spoilt[0, -1, -1] = np.nan
    pads = ((1, 1), (1, 1))
    run = jax.jit(lambda x: winograd.conv_winograd(x, kernel, pads, 4))
    clean, found = run(x), run(spoilt)
    np.testing.assert_array_equal(found[0, :8, :8], clean[0, :8, :8])
    assert bool(jnp.isnan(found[0, 8:, 8:]).all())
