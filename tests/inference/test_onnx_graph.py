"""Graphs in onnxruntime against the networks in JAX; ``--long`` takes every registered network."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest

from pcam_jax.inference.artifact import OUTPUTS
from pcam_jax.inference.exporting import answering
from pcam_jax.inference.onnx_graph import to_onnx
from pcam_jax.models import densenet, efficientnet, pooling, registry, resnet
from pcam_jax.models.platform import portable_formulations
from pcam_jax.models.registry import Net, build_model
from pcam_jax.run.operating_point import OperatingPoint
from pcam_jax.runtime.errors import UserError

# each family's blocks in few layers
SMALL = {
    "small_densenet": functools.partial(densenet.DenseNet, (2, 1), growth=4, stem_features=8),
    "small_efficientnet": functools.partial(
        efficientnet.EfficientNet, efficientnet.B0_STAGES[:2], dropout=0.2, stochastic_depth=0.1
    ),
    "small_bottleneck": functools.partial(
        resnet.ResNet, resnet.Bottleneck, (1, 1), features=(8, 16), base_width=64
    ),
    "small_basic": functools.partial(
        resnet.ResNet, resnet.BasicBlock, (1, 1), features=(8, 16), base_width=64
    ),
}
SIDES = {"idc_cnn": 50, "melanoma_v1": 256, "melanoma_v2": 256, "melanoma_v3": 256}


@pytest.fixture(autouse=True)
def small_nets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, factory in SMALL.items():
        monkeypatch.setitem(registry._FACTORIES, name, with_dtype(factory))


def with_dtype(factory: Any) -> Any:
    def build(*, image_shape: Any, outputs: int, dtype: Any = jnp.float32) -> Any:
        return factory(image_shape=image_shape, outputs=outputs, dtype=dtype)

    return build


def weighted(name: str, side: int, outputs: int = 1, **options: Any) -> tuple[Net, Any]:
    """A network with statistics that are not those it starts with."""
    net = build_model(name, image_shape=(side, side, 3), outputs=outputs, **options)
    params, stats = net.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    stats = jax.tree.map(lambda leaf: leaf + rng.uniform(0.05, 0.2, leaf.shape).astype(np.float32), stats)
    return net, (params, stats)


def converted(function: Any, image_shape: tuple[int, int, int]) -> tuple[onnx.ModelProto, Any]:
    with portable_formulations():
        content, _ = to_onnx(function, image_shape, OUTPUTS, "net")
    return onnx.load_from_string(content), onnxruntime.InferenceSession(content)


def check(net: Net, weights: Any, scheme: str = "unit", batches: tuple[int, ...] = (3, 1)) -> Counter[str]:
    """Compare both and return how often each operation stands in the graph."""
    function = answering(net, weights, scheme, OperatingPoint(temperature=0.7, threshold=0.5))
    model, session = converted(function, net.image_shape)
    images = np.random.default_rng(1).integers(0, 256, (max(batches), *net.image_shape), dtype=np.uint8)
    expected = [np.asarray(array) for array in jax.jit(function)(images)]
    for batch in batches:
        for found, wanted in zip(session.run(OUTPUTS, {"images": images[:batch]}), expected, strict=True):
            assert found.shape == wanted[:batch].shape
            assert found.dtype == wanted.dtype
            np.testing.assert_allclose(found, wanted[:batch], rtol=1e-5, atol=1e-5)
    used = {name for node in model.graph.node for name in node.input}
    assert {constant.name for constant in model.graph.initializer} <= used
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize("name", [*SMALL, "pcam_model4"])
def test_small_networks(name: str) -> None:
    operations = check(*weighted(name, 32), scheme="imagenet")
    # one into the order of ONNX, one out of it to flatten; a gate of squeeze and excitation takes two
    assert operations["Transpose"] <= (2 if "efficient" not in name else 10)
    assert not set(operations) & {"Gather", "Expand"}


def test_equivariant_networks_keep_their_kernels_in_all_orientations() -> None:
    operations = check(*weighted("p4m_cnn", 24, padding="same", width=2, blocks=2))
    assert operations["MatMul"] == 1  # the head; the products that turn kernels are done


@pytest.mark.parametrize("outputs", [2, 3])
def test_heads_with_several_outputs(outputs: int) -> None:
    check(*weighted("pcam_model4", 32, outputs))


def test_every_registered_network(long: bool) -> None:
    if not long:
        pytest.skip("minutes of compilation: --long")
    for name in sorted(set(registry.model_names()) - set(SMALL) - {"tiny"}):
        check(*weighted(name, SIDES.get(name, 96)), batches=(2,))


def batched(function: Any) -> Any:
    return lambda images: (function(images.astype(jnp.float32) / 255),)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: pooling.max_pool(x, 3, 2, 1),
        lambda x: pooling.avg_pool(x, 3, 2),
        lambda x: x.sum((1, 2, 3)),
        lambda x: x.max((1, 2)),
        lambda x: x.sum(3),
        lambda x: jnp.where(x > 0.5, x**3, -x).mean((1, 2)),
        lambda x: jax.lax.pad(x, jnp.float32(2), ((0, 0, 0), (1, 2, 0), (0, 3, 0), (0, 0, 0))),
        lambda x: pooling.max_pool(x, 2)[..., None].sum(4),
        lambda x: jnp.argmax(x.sum((1, 2)), axis=1).astype(jnp.int32),
        lambda x: jax.lax.rsqrt(jnp.tanh(x) + 1) - jnp.abs(x - 0.5),
    ],
)
def test_operations(function: Any) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 12, 10, 3), dtype=np.uint8)
    with portable_formulations():
        content, _ = to_onnx(batched(function), (12, 10, 3), ["y"], "operation")
        expected = np.asarray(batched(function)(images)[0])
    (found,) = onnxruntime.InferenceSession(content).run(None, {"images": images})
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_an_unknown_operation_is_said() -> None:
    with pytest.raises(
        UserError, match="the operation 'sort', which is not converted to ONNX: export it as stablehlo"
    ):
        to_onnx(batched(lambda x: jnp.sort(x, axis=3)), (12, 10, 3), ["y"], "sorting")
    with pytest.raises(UserError, match="a product of an unusual kind"):
        to_onnx(batched(lambda x: jnp.einsum("bhwc,bhwd->bcd", x, x)), (12, 10, 3), ["y"], "product")
