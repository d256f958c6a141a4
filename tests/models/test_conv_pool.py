from __future__ import annotations

import functools

import float64_reference as reference
import jax
import numpy as np
import pytest

from pcam_jax.models import conv_pool, convolution, layers, winograd
from pcam_jax.models.registry import build_model


def separate_steps(x, kernel, bias, pads, grad):
    """Float64 (output, gradients of x, kernel and bias) of convolution, pool and ReLU one after another."""
    size = (n + sum(p) - kernel.shape[0] + 1 for n, p in zip(x.shape[1:3], pads, strict=True))
    unused = np.zeros((x.shape[0], *size, kernel.shape[3]))
    mapped = reference.conv2d(x, kernel, 1, pads, unused)[0] + bias
    pooled, _ = reference.max_pool(mapped, 2, 2, 0, grad)
    grad = np.where(pooled > 0, grad, 0)
    _, grad_map = reference.max_pool(mapped, 2, 2, 0, grad)
    _, grad_x, grad_kernel = reference.conv2d(x, kernel, 1, pads, grad_map)
    return np.maximum(pooled, 0), grad_x, grad_kernel, grad.sum((0, 1, 2))


@functools.partial(jax.jit, static_argnums=(4,))
def output_and_gradients(x, kernel, bias, grad, padding):
    output, pull_back = jax.vjp(lambda *given: conv_pool.conv_relu_pool(*given, padding), x, kernel, bias)
    return output, *pull_back(grad)


# batch, size, channels, taps, padding: both methods, even and odd maps, one and several parts of the batch
@pytest.mark.parametrize(
    ("batch", "size", "inputs", "taps", "padding", "parts"),
    [
        (2, (8, 10), 3, 3, "valid", 1),
        (4, (9, 11), 3, 3, "valid", 4),
        (2, (8, 9), 3, 5, "same", 2),
        (2, (17, 18), 32, 3, "valid", 1),
        (4, (16, 15), 32, 3, 1, 2),
        (2, (15, 13), 16, 5, "same", 2),
    ],
)
def test_block_equals_its_steps_in_float64(monkeypatch, batch, size, inputs, taps, padding, parts):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(batch, *size, inputs)).astype(np.float32)
    kernel = rng.normal(size=(taps, taps, inputs, 32)).astype(np.float32)
    bias = rng.normal(size=32).astype(np.float32)
    for module in (conv_pool, winograd):
        monkeypatch.setattr(module, "count_parts", lambda *_: parts)
    monkeypatch.setattr(winograd, "_KERNEL_TRANSFORM", 0)  # tiles even for these small maps
    assert conv_pool.takes(x, kernel, 1, padding)
    pads = convolution.resolve_padding(padding, size, (taps, taps), 1)
    rows, columns = ((n + sum(p) - taps + 1) // 2 for n, p in zip(size, pads, strict=True))
    grad = rng.normal(size=(batch, rows, columns, 32)).astype(np.float32)
    output_and_gradients.clear_cache()
    found = output_and_gradients(x, kernel, bias, grad, padding)
    for ours, exact in zip(found, separate_steps(x, kernel, bias, pads, grad), strict=True):
        assert ours.shape == exact.shape
        assert np.linalg.norm(ours - exact) < 1e-5 * np.linalg.norm(exact)


def test_block_is_left_to_its_steps_where_it_does_not_apply(monkeypatch):
    x, kernel = np.zeros((8, 26, 26, 32), np.float32), np.zeros((3, 3, 32, 32), np.float32)
    assert conv_pool.takes(x, kernel, 1, "valid")
    assert not conv_pool.takes(x, kernel, 2, "valid")
    assert not conv_pool.takes(x[..., :8], kernel[:, :, :8], 1, "valid")
    monkeypatch.setattr(conv_pool, "prefers_cpu_formulations", lambda: False)
    assert not conv_pool.takes(x, kernel, 1, "valid")


def test_observed_nets_show_convolution_and_pool():
    net = build_model("pcam_cnn3", image_shape=(24, 24, 3), outputs=1)
    assert [row.name for row in net.summary()][:4] == ["conv1", "pool1", "conv2", "pool2"]


def test_layer_gives_the_same_observed_or_not():
    conv, pool = layers.Conv(3, 16, 3), layers.MaxPool(2)
    rng = np.random.default_rng(0)
    conv.kernel[...] = jax.numpy.asarray(rng.normal(size=(3, 3, 3, 16)), jax.numpy.float32)
    x = jax.numpy.asarray(rng.normal(size=(2, 9, 8, 3)), jax.numpy.float32)
    fused = layers.conv_relu_pool(conv, pool, x)
    with layers.recording() as rows:
        separate = layers.conv_relu_pool(conv, pool, x)
    assert [shape for _, shape in rows] == [(2, 7, 6, 16), (2, 3, 3, 16)]
    np.testing.assert_allclose(fused, separate, atol=1e-5)
