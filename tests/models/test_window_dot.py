from __future__ import annotations

import functools

import float64_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pcam_jax.models import convolution, window_dot
from pcam_jax.models.registry import build_model


@pytest.fixture
def matrix_units(monkeypatch):
    """As if this machine had them: the form is right on every CPU, and fast on those."""
    monkeypatch.setattr(window_dot, "works_here", lambda: True)


def exact_in_bfloat16(rng, *shape):
    return np.asarray(jnp.asarray(rng.normal(size=shape), jnp.bfloat16).astype(jnp.float32))


@functools.partial(jax.jit, static_argnums=(3, 4))
def output_and_gradients(x, kernel, grad, stride, pads):
    output, pull_back = jax.vjp(lambda x, k: convolution.conv2d(x, k, stride=stride, padding=pads), x, kernel)
    return output, *pull_back(grad)


# size, channels in and out, taps, stride, padding: first layers, odd sizes, 5x5, ResNet's stem and downsampling,
# a stride that divides its kernel, a 1x1 with and without stride
@pytest.mark.parametrize(
    ("size", "inputs", "outputs", "taps", "stride", "padding", "parts"),
    [
        ((9, 11), 3, 32, 3, 1, "valid", 1),
        ((9, 8), 32, 16, 3, 1, 1, 2),
        ((11, 9), 16, 16, 5, 1, "same", 2),
        ((12, 13), 16, 32, 3, 2, 1, 2),
        ((12, 12), 3, 8, 7, 2, 3, 1),
        ((12, 12), 3, 16, 6, 3, "same", 2),
        ((7, 7), 16, 8, 1, 1, "valid", 1),
        ((7, 8), 16, 32, 1, 2, "valid", 1),
    ],
)
def test_equals_float64_but_for_the_rounding_of_its_result(
    monkeypatch, matrix_units, size, inputs, outputs, taps, stride, padding, parts
):
    monkeypatch.setattr(window_dot, "count_parts", lambda *_: parts)
    rng = np.random.default_rng(0)
    x = exact_in_bfloat16(rng, 4, *size, inputs)
    kernel = exact_in_bfloat16(rng, taps, taps, inputs, outputs)
    pads = convolution.resolve_padding(padding, size, (taps, taps), stride)
    shape = [convolution.output_size(n, taps, stride, p) for n, p in zip(size, pads, strict=True)]
    grad = exact_in_bfloat16(rng, 4, *shape, outputs)
    output_and_gradients.clear_cache()
    found = output_and_gradients(*(jnp.asarray(a, jnp.bfloat16) for a in (x, kernel, grad)), stride, padding)
    for ours, exact in zip(found, reference.conv2d(x, kernel, stride, pads, grad), strict=True):
        assert ours.dtype == jnp.bfloat16
        assert ours.shape == exact.shape
        # bfloat16 keeps eight bits: each number is rounded by at most 2**-9 of itself
        assert np.linalg.norm(np.asarray(ours, np.float64) - exact) < 2**-9 * np.linalg.norm(exact)


@pytest.mark.parametrize(("name", "side"), [("pcam_cnn3", 24), ("pcam_model4", 24), ("resnet_small", 32)])
def test_a_net_answers_and_learns_as_in_float32(matrix_units, name, side):
    def value_and_gradient(dtype):
        net = build_model(name, image_shape=(side, side, 3), outputs=1, dtype=dtype)
        params, stats = net.init(jax.random.key(0))
        x = jnp.asarray(np.random.default_rng(1).random((4, side, side, 3)), jnp.float32)

        @jax.jit
        def run(params):
            return jax.value_and_grad(lambda p: net.apply(p, stats, x)[0].sum())(params)

        value, grad = run(params)
        return np.asarray([value]), np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(grad)])

    for narrow, wide in zip(value_and_gradient(jnp.bfloat16), value_and_gradient(jnp.float32), strict=True):
        assert not np.array_equal(narrow, wide)
        assert np.linalg.norm(narrow - wide) < 0.08 * np.linalg.norm(wide)


def test_the_probe_passes_where_the_form_is_right_and_fails_where_it_is_not(monkeypatch):
    assert window_dot.probe()
    monkeypatch.setattr(window_dot, "_dot", lambda a, b, *contract: jnp.zeros((a.shape[0], b.shape[1])))
    assert not window_dot.probe()


def test_a_refused_product_means_no(monkeypatch):
    def refuse(*operands):
        raise jax.errors.JaxRuntimeError("UNIMPLEMENTED")

    monkeypatch.setattr(window_dot, "_dot", refuse)
    assert not window_dot.probe()


def test_what_the_precision_comes_to_is_said(matrix_units, monkeypatch):
    assert window_dot.describe_precision("float32") == "float32"
    assert window_dot.describe_precision("bfloat16") == "bfloat16 on the CPU's matrix units"
    monkeypatch.setattr(window_dot, "works_here", lambda: False)
    assert "convolutions in float32" in window_dot.describe_precision("bfloat16")


def test_other_machines_never_take_it(monkeypatch):
    monkeypatch.setattr(window_dot, "has_bfloat16_matrix_units", lambda: False)
    window_dot.works_here.cache_clear()
    assert not window_dot.works_here()
    window_dot.works_here.cache_clear()
