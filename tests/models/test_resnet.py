from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pcam_jax.models.registry import build_model


@pytest.mark.parametrize(
    ("stem", "first", "last"), [("imagenet", 24, 3), ("stride2", 48, 6), ("stride1", 96, 12)]
)
def test_stems_set_the_resolution(stem, first, last):
    net = build_model("resnet18", image_shape=(96, 96, 3), outputs=1, stem=stem)
    shapes = {row.name: row.output_shape for row in net.summary()}
    assert shapes["layer1.0"] == (first, first, 64)
    assert shapes["layer4.1"] == (last, last, 512)


def test_zero_init_residual_starts_blocks_as_the_identity():
    net = build_model("resnet_small", image_shape=(32, 32, 3), outputs=1, zero_init_residual=True)
    params, _ = net.init(jax.random.key(0))
    assert not params["layer1"]["0"]["bn2"]["scale"].any()
    assert params["layer1"]["0"]["bn1"]["scale"].all()


def test_bottlenecks_stride_on_the_3x3_convolution():
    net = build_model("resnet50", image_shape=(64, 64, 3), outputs=1)
    params, batch_stats = jax.eval_shape(net.init, jax.random.key(0))
    assert params["layer2"]["0"]["conv2"]["kernel"].shape == (3, 3, 128, 128)
    text = (
        jax.jit(net.apply)
        .lower(params, batch_stats, jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32))
        .as_text()
    )
    # The 3x3 convolution of layer2.0 takes 16x16 to 8x8; in v1 a 1x1 would already have done so.
    assert "(tensor<1x16x16x128xf32>, tensor<3x3x128x128xf32>) -> tensor<1x8x8x128xf32>" in text


def test_wide_net_doubles_the_inner_channels():
    net = build_model("wide_resnet50_2", image_shape=(64, 64, 3), outputs=1)
    params, _ = jax.eval_shape(net.init, jax.random.key(0))
    assert params["layer1"]["0"]["conv2"]["kernel"].shape == (3, 3, 128, 128)
    assert params["layer1"]["0"]["conv3"]["kernel"].shape == (1, 1, 128, 256)


def test_initial_kernels_are_he_normal_by_fan_out():
    net = build_model("resnet_small", image_shape=(32, 32, 3), outputs=4)
    params, _ = net.init(jax.random.key(0))
    kernel = np.asarray(params["layer4"]["1"]["conv2"]["kernel"])
    assert abs(kernel.std() / np.sqrt(2 / (9 * 256)) - 1) < 0.01
    assert np.abs(np.asarray(params["fc"]["kernel"])).max() <= 256**-0.5
