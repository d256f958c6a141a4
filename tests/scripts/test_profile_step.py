"""A profile names the operations of a step, counts their arithmetic, and divides its time among them."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from recorded import SCRIPTS, recorded


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        yield importlib.import_module("profile_step")


@pytest.fixture(scope="module")
def operations(script: ModuleType) -> Callable[..., list[Any]]:
    """Of a function compiled for some arguments."""

    def read(function: Callable[..., Any], *arguments: Any) -> list[Any]:
        return list(script.read_program(jax.jit(function).lower(*arguments).compile().as_text()).values())

    return read


def test_counts_what_a_matrix_product_multiplies(operations):
    a, b = jnp.ones((7, 30)), jnp.ones((30, 5))
    (product,) = [found for found in operations(lambda a, b: jnp.tanh(a @ b), a, b) if found.flops]
    assert product.flops == 2 * 7 * 30 * 5
    assert product.kind == "matrix products"
    assert product.result == "f32[7,5]"
    assert product.source.endswith("dot_general")


@pytest.mark.parametrize("groups", [1, 3])
def test_counts_what_a_convolution_multiplies(operations, groups):
    image, kernel = jnp.ones((2, 9, 9, 6)), jnp.ones((3, 3, 6 // groups, 12))

    def convolve(x, kernel):
        dimensions = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "VALID", dimension_numbers=dimensions, feature_group_count=groups
        )

    found = operations(convolve, image, kernel)
    assert sum(part.flops for part in found) == 2 * (2 * 7 * 7 * 12) * (3 * 3 * 6 // groups)


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (lambda x: jnp.tanh(x) * 2, "elementwise"),
        (lambda x: x.sum(0), "reductions"),
        (lambda x: jnp.pad(x, 3).T, "copies and layouts"),
        (lambda x: x.astype(jnp.bfloat16), "conversions of dtype"),
    ],
)
def test_tells_kinds_apart(operations, function, kind):
    found = [part for part in operations(function, jnp.ones((40, 50))) if part.source]
    assert kind in {part.kind for part in found}


def test_tells_forward_from_backward(operations):
    found = operations(jax.grad(lambda w, x: jnp.tanh(x @ w).sum()), jnp.ones((20, 30)), jnp.ones((10, 20)))
    assert {part.phase for part in found if part.flops} == {"forward", "backward"}


def test_time_of_several_operations_is_divided_among_them(script):
    under_way = [(0.0, 4.0, "a"), (1.0, 3.0, "b"), (2.0, 3.0, "b"), (6.0, 7.0, "a")]
    seconds = script.divided([script.Span(*span) for span in under_way])
    assert seconds["a"] == pytest.approx(1 + 1 / 2 + 1 / 3 + 1 + 1)
    assert sum(seconds.values()) == pytest.approx(5.0)  # what is covered, counted once


@pytest.mark.parametrize("task", ["train", "predict"])
def test_profiles_a_step(tmp_path, task):
    options = ["--model", "pcam_model4", "--batch", "4", "--steps", "2", "--task", task, "--longest", "99"]
    facts, printed = recorded("profile_step.py", tmp_path / "profile", *options)
    products = [row for row in facts["longest"] if row["flops"]]
    assert {row["kind"] for row in products} == {"matrix products"}
    assert len(products) >= 4  # three convolutions and a dense layer, more with their gradients
    assert facts["devices"] == (2 if task == "predict" else 1)
    assert sum(sum(kind["ms"].values()) for kind in facts["kinds"]) == pytest.approx(facts["operations_ms"])
    assert "| matrix products |" in printed


def test_an_unknown_network_is_one_sentence():
    command = [sys.executable, SCRIPTS / "profile_step.py", "--model", "resnet51"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "resnet51" in done.stderr
    assert "Traceback" not in done.stderr
