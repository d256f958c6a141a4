from __future__ import annotations

import functools

import float64_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pcam_jax.models import convolution

# side, input size, channels in and out, stride, padding: the shapes of the nets, smaller
CASES = [
    (3, (9, 8), 3, 8, 1, "valid"),
    (3, (14, 13), 32, 32, 1, "same"),
    (5, (14, 12), 16, 32, 1, "same"),
    (6, (11, 11), 16, 16, 3, "same"),
    (3, (8, 9), 16, 16, 2, 1),
    (4, (9, 10), 8, 8, 3, "same"),
    (2, (7, 7), 8, 8, 3, "valid"),
    (5, (9, 11), 3, 8, 2, "same"),
    (5, (8, 8), 6, 8, 1, "same"),
    (6, (13, 12), 3, 4, 3, "same"),
    (7, (16, 15), 3, 8, 2, 3),
    (3, (7, 7), 8, 8, 2, 1),
    (1, (6, 5), 8, 12, 1, "valid"),
    (1, (7, 8), 8, 12, 2, 0),
    (1, (6, 5), 8, 12, 1, 1),
]


@functools.partial(jax.jit, static_argnums=(0, 4))
def output_and_gradients(formulation, x, kernel, grad, settings):
    output, pull_back = jax.vjp(functools.partial(formulation, **dict(settings)), x, kernel)
    return output, *pull_back(grad)


def check(formulation, x, kernel, stride, pads, settings, depthwise=False):
    rows, columns = (
        convolution.output_size(n, k, stride, p)
        for n, k, p in zip(x.shape[1:3], kernel.shape[:2], pads, strict=True)
    )
    grad = (
        np.random.default_rng(2).normal(size=(x.shape[0], rows, columns, kernel.shape[3])).astype(np.float32)
    )
    expected = reference.conv2d(x, kernel, stride, pads, grad, depthwise)
    found = output_and_gradients(formulation, x, kernel, grad, tuple(settings.items()))
    for name, ours, theirs in zip(("output", "x", "kernel"), found, expected, strict=True):
        error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        assert error < 5e-6, (name, error)


@pytest.mark.parametrize(("side", "size", "inputs", "outputs", "stride", "padding"), CASES)
def test_output_and_gradients_against_float64(side, size, inputs, outputs, stride, padding):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, *size, inputs)).astype(np.float32)
    kernel = rng.normal(size=(side, side, inputs, outputs)).astype(np.float32)
    pads = convolution.resolve_padding(padding, size, (side, side), stride)
    check(convolution.conv2d, x, kernel, stride, pads, {"stride": stride, "padding": padding})


@pytest.mark.parametrize(("side", "stride"), [(3, 1), (3, 2), (5, 2)])
def test_depthwise_against_float64(side, stride):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 7, 8, 6)).astype(np.float32)
    kernel = rng.normal(size=(side, side, 1, 6)).astype(np.float32)
    pad = (side - 1) // 2
    settings = {"stride": stride, "padding": pad, "groups": 6}
    check(convolution.conv2d, x, kernel, stride, ((pad, pad), (pad, pad)), settings, depthwise=True)


def test_the_accelerators_form_gives_the_same(monkeypatch):
    # numpy's numbers: compiling jax's takes a second for each shape
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 7, 8, 16)).astype(np.float32)
    shapes = {"dot": (1, 1, 16, 4), "tiles": (3, 3, 16, 16), "few": (3, 3, 3, 4), "depth": (2, 2, 16, 4)}
    kernels = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    depthwise = rng.normal(size=(3, 3, 1, 16)).astype(np.float32)

    def run(x, kernels, depthwise):
        return (
            convolution.conv2d(x, kernels["dot"], stride=2),
            convolution.conv2d(x, kernels["tiles"], padding=1),
            convolution.conv2d(x[..., :3], kernels["few"], padding="same"),
            convolution.conv2d(x, kernels["depth"], stride=2, padding="same"),
            convolution.conv2d(x, depthwise, padding=1, groups=16),
        )

    here = jax.jit(run)(x, kernels, depthwise)
    monkeypatch.setattr(convolution, "prefers_cpu_formulations", lambda: False)
    for ours, plain in zip(here, jax.jit(lambda *a: run(*a))(x, kernels, depthwise), strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-4)


@pytest.mark.parametrize("length", [5, 6, 7, 96])
@pytest.mark.parametrize("kernel", [1, 2, 3, 6])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_same_padding_gives_ceil_of_input_over_stride(length, kernel, stride):
    (rows, _) = convolution.resolve_padding("same", (length, 1), (kernel, 1), stride)
    assert convolution.output_size(length, kernel, stride, rows) == -(-length // stride)
    assert 0 <= rows[1] - rows[0] <= 1


def test_a_bfloat16_image_gives_a_bfloat16_map():
    for side in (1, 3):
        y = convolution.conv2d(
            jnp.ones((1, 4, 4, 2), jnp.bfloat16), jnp.ones((side, side, 2, 3), jnp.bfloat16)
        )
        assert y.dtype == jnp.bfloat16
