from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pcam_jax.models import registry
from pcam_jax.models.platform import portable_formulations
from pcam_jax.models.registry import build_model, model_names
from pcam_jax.runtime.errors import UserError

# Trainable parameters: the seeds' own counts (Keras counts running statistics too), torchvision's, and those of
# the equivariant nets worked out by hand from their layers.
PARAMETERS = [
    ("pcam_model1", 96, 1, 1_694_849),
    ("pcam_model2", 96, 1, 2_515_585),
    ("pcam_model3", 96, 1, 257_633),
    ("pcam_model4", 96, 1, 257_633),
    ("pcam_cnn3", 96, 1, 1_731_905),
    ("idc_cnn", 50, 2, 2_513_642),
    ("melanoma_v1", 500, 1, 11_354_369),
    ("melanoma_v2", 500, 1, 14_714_753),
    ("melanoma_v3", 500, 1, 10_535_809),
    ("resnet18", 96, 1000, 11_689_512),
    ("resnet34", 96, 1000, 21_797_672),
    ("resnet50", 96, 1000, 25_557_032),
    ("resnet50", 96, 1, 23_510_081),
    ("wide_resnet50_2", 96, 1000, 68_883_240),
    ("resnet_small", 96, 1, 2_780_577),
    ("densenet121", 96, 1000, 7_978_856),
    ("efficientnet_b0", 96, 1000, 5_288_548),
    ("p4_densenet", 96, 1, 129_104),
    ("p4m_densenet", 96, 1, 123_400),
    ("p4m_cnn", 96, 1, 32_585),
    ("p4m_resnet", 96, 1, 347_065),
]
# The smallest sides that keep each kind of net quick to compile.
SMALL = {"pcam_cnn3": 24, "idc_cnn": 12, "resnet_small": 32}


@functools.cache
def small(name, dtype=jnp.float32, **options):
    net = build_model(name, image_shape=(SMALL[name], SMALL[name], 3), outputs=2, dtype=dtype, **options)
    params, batch_stats = net.init(jax.random.key(0))
    return (
        net,
        params,
        batch_stats,
        jnp.asarray(np.random.default_rng(1).random((4, *net.image_shape)), jnp.float32),
    )


@pytest.mark.parametrize(("name", "side", "outputs", "count"), PARAMETERS)
def test_parameter_counts(name, side, outputs, count):
    net = build_model(name, image_shape=(side, side, 3), outputs=outputs)
    assert net.param_count == count
    assert sum(row.params for row in net.summary()) == count
    assert net.summary()[-1].output_shape == (outputs,)


def test_every_net_has_a_counted_case():
    # other tests of the same process may have made the tiny net known
    assert {case[0] for case in PARAMETERS} == set(model_names()) - {"tiny"}


def test_idc_counts_with_its_statistics_as_keras_does():
    net = build_model("idc_cnn", image_shape=(50, 50, 3), outputs=2)
    assert net.param_count + net.batch_stat_count == 2_514_410


@pytest.mark.parametrize("name", sorted(SMALL))
def test_init_apply_features_classify(name):
    net, params, batch_stats, x = small(name)

    @jax.jit
    def both(params, batch_stats, x):
        features = net.features(params, batch_stats, x)
        return net.apply(params, batch_stats, x), features, net.classify(params, batch_stats, features)

    (logits, same_stats), features, classified = both(params, batch_stats, x)
    assert logits.shape == (4, 2)
    assert logits.dtype == jnp.float32
    assert features.ndim == 4
    np.testing.assert_array_equal(logits, classified)
    jax.tree.map(np.testing.assert_array_equal, same_stats, batch_stats)
    permuted = both(params, batch_stats, x[::-1])[0][0]
    np.testing.assert_allclose(permuted[::-1], logits, atol=1e-5)


@pytest.mark.parametrize("name", ["pcam_cnn3", "idc_cnn", "resnet_small"])
def test_training_draws_dropout_from_its_key_and_updates_statistics(name):
    net, params, batch_stats, x = small(name)

    @jax.jit
    def step(params, batch_stats, key):
        def loss(params):
            logits, new_stats = net.apply(params, batch_stats, x, train=True, key=key)
            return (logits**2).sum(), (logits, new_stats)

        (_, rest), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return *rest, grads

    logits, new_stats, grads = step(params, batch_stats, jax.random.key(2))
    again, _, _ = step(params, batch_stats, jax.random.key(2))
    other, _, _ = step(params, batch_stats, jax.random.key(3))
    np.testing.assert_array_equal(logits, again)
    assert bool(jnp.array_equal(logits, other)) == (name == "resnet_small")
    assert jax.tree.structure(new_stats) == jax.tree.structure(batch_stats)
    for before, after in zip(jax.tree.leaves(batch_stats), jax.tree.leaves(new_stats), strict=True):
        assert not jnp.array_equal(before, after)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))


def test_parameters_are_plain_nested_dicts_of_float32():
    _, params, batch_stats, _ = small("resnet_small")

    def check(tree):
        if isinstance(tree, dict):
            assert type(tree) is dict
            for key, value in tree.items():
                assert type(key) is str
                check(value)
        else:
            assert isinstance(tree, jax.Array)
            assert tree.dtype == jnp.float32

    check(params)
    check(batch_stats)
    assert params["layer2"]["0"]["downsample"]["0"]["kernel"].shape == (1, 1, 32, 64)


def test_init_is_a_function_of_the_key():
    net, params, _, _ = small("pcam_cnn3")
    again, _ = net.init(jax.random.key(0))
    other, _ = net.init(jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, params, again)
    assert not np.array_equal(params["conv1"]["kernel"], other["conv1"]["kernel"])


def test_another_head_leaves_the_body_as_it_was():
    _, params, _, _ = small("pcam_cnn3")
    other, _ = build_model("pcam_cnn3", image_shape=(24, 24, 3), outputs=5).init(jax.random.key(0))
    np.testing.assert_array_equal(params["conv3"]["kernel"], other["conv3"]["kernel"])
    assert other["output"]["kernel"].shape[-1] == 5


def test_bfloat16_arithmetic_keeps_float32_parameters_and_logits():
    net, params, batch_stats, x = small("pcam_cnn3", dtype=jnp.bfloat16)

    @jax.jit
    def run(params, batch_stats, x):
        return net.apply(params, batch_stats, x)[0], net.features(params, batch_stats, x)

    with portable_formulations():  # this CPU may go on in float32
        logits, features = run(params, batch_stats, x)
    assert features.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves((params, logits))} == {jnp.dtype("float32")}
    exact = small("pcam_cnn3")[0].apply(params, batch_stats, x)[0]
    np.testing.assert_allclose(logits, exact, atol=0.05 * float(jnp.abs(exact).max()))
    assert not jnp.array_equal(logits, exact)


def test_seeds_begin_as_keras_does():
    _, params, _, _ = small("pcam_cnn3")
    kernel = np.asarray(params["conv2"]["kernel"])
    assert np.abs(kernel).max() <= np.sqrt(6 / (9 * 32 + 9 * 64))
    assert not np.asarray(params["conv2"]["bias"]).any()
    _, params, batch_stats, _ = small("idc_cnn")
    limit = np.sqrt(6 / (9 * 32))
    assert 0.98 * limit < np.abs(np.asarray(params["conv2"]["kernel"])).max() <= limit
    assert np.asarray(batch_stats["norm1"]["var"]).all()
    assert not np.asarray(batch_stats["norm1"]["mean"]).any()


def test_summary_lists_layers_in_the_order_they_run():
    rows = build_model("pcam_model4", image_shape=(96, 96, 3), outputs=1).summary()
    assert [(row.name, row.output_shape, row.params) for row in rows] == [
        ("conv1", (32, 32, 32), 3_488),
        ("conv2", (11, 11, 64), 73_792),
        ("conv3", (4, 4, 64), 147_520),
        ("flatten", (1024,), 0),
        ("dropout1", (1024,), 0),
        ("dense1", (32,), 32_800),
        ("output", (1,), 33),
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "resnet51"}, r"no model 'resnet51' \(did you mean resnet50 .*known models: densenet121"),
        (
            {"name": "pcam_cnn3", "dropuot": 0.1},
            r"no option 'dropuot' \(did you mean dropout\?\); it takes dropout",
        ),
        ({"name": "pcam_model1", "depth": 3}, r"no option 'depth'; it takes none"),
        (
            {"name": "pcam_cnn3", "side": 16},
            r"'pcam_cnn3' cannot take 16x16 images.* too deep .* 2x2 map to 0x0",
        ),
        ({"name": "melanoma_v3"}, r"cannot take 96x96 images"),
        (
            {"name": "resnet18", "stem": "tiny"},
            r"[Uu]nknown stem 'tiny': choose one of imagenet, stride2, stride1",
        ),
    ],
)
def test_users_mistakes_are_sentences(arguments, words):
    side = arguments.pop("side", 96)
    with pytest.raises(UserError, match=words):
        build_model(arguments.pop("name"), image_shape=(side, side, 3), outputs=1, **arguments)


def test_options_are_listed_with_their_defaults():
    assert registry.model_options("pcam_model4") == {"dropout": 0.2}
    assert registry.model_options("resnet50") == {"stem": "imagenet", "zero_init_residual": False}
