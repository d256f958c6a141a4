from __future__ import annotations

import re

import jax
import numpy as np
import pytest
import torchvision_case as case
from hypothesis import given, settings
from hypothesis import strategies as st

from pcam_jax.models.pretrained import fit_tensors, to_torchvision
from pcam_jax.models.registry import build_model, model_names
from pcam_jax.runtime.errors import UserError

REFERENCE = dict(np.load(case.REFERENCE))
# what takes time here is compiling; the arithmetic is the same
QUICK = {"xla_backend_optimization_level": 0}


def reference_shapes(name):
    """Names and shapes of the tensors of a net of torchvision or timm."""
    lines = (line.split(" ") for line in REFERENCE[f"{name}.tensors"].tolist())
    return {key: tuple(map(int, "".join(shape).split("x"))) if shape else () for key, *shape in lines}


def case_weights(name):
    return {
        key: case.weight(key, shape)
        for key, shape in reference_shapes(name).items()
        if "num_batches" not in key
    }


def empty_weights(net):
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)


def logits_of(net, fitted, images):
    run = jax.jit(lambda params, stats, x: net.apply(params, stats, x)[0], compiler_options=QUICK)
    return np.asarray(run(fitted.params, fitted.batch_stats, images))


@pytest.fixture(scope="module")
def small():
    """ResNet-18 with its torchvision weights made from numbers."""
    net = build_model("resnet18", image_shape=(32, 32, 3), outputs=case.OUTPUTS)
    return net, empty_weights(net), case_weights("resnet18")


@pytest.mark.parametrize("name", case.SIZES)
def test_a_net_answers_as_torchvisions(name):
    tensors, images = case_weights(name), case.images(name)
    net = build_model(name, image_shape=images.shape[1:], outputs=case.OUTPUTS)
    fitted = fit_tensors(net, *empty_weights(net), tensors, "a file")
    assert fitted.sentences == [f"Loaded {len(tensors)} of {len(tensors)} tensors from a file."]
    # every tensor must have found its place: what goes back equals what came
    back = to_torchvision(net, fitted.params, fitted.batch_stats)
    assert {key: value.shape for key, value in back.items()} == reference_shapes(name)
    assert all((back[key] == value).all() for key, value in tensors.items())
    assert {value.dtype.name for key, value in back.items() if "num_batches" in key} <= {"int64"}
    expected = REFERENCE[f"{name}.logits"]
    assert np.abs(expected).max() > 0.3
    np.testing.assert_allclose(logits_of(net, fitted, images), expected, rtol=0, atol=1e-4)


def test_timms_names_for_efficientnet_are_understood():
    tensors, images = case_weights("timm/efficientnet_b0"), case.images("efficientnet_b0")
    net = build_model("efficientnet_b0", image_shape=images.shape[1:], outputs=case.OUTPUTS)
    fitted = fit_tensors(net, *empty_weights(net), tensors, "a file")
    expected = REFERENCE["timm/efficientnet_b0.logits"]
    np.testing.assert_allclose(logits_of(net, fitted, images), expected, rtol=0, atol=1e-4)


def test_old_densenet_files_are_understood():
    net = build_model("densenet121", image_shape=(64, 64, 3), outputs=case.OUTPUTS)
    now = case_weights("densenet121")
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", key): v for key, v in now.items()}
    assert len(old.keys() - now.keys()) == 10 * (6 + 12 + 24 + 16)
    fitted = fit_tensors(net, *empty_weights(net), old, "a file")
    back = to_torchvision(net, fitted.params, fitted.batch_stats)
    assert all((back[key] == value).all() for key, value in now.items())


@pytest.mark.parametrize("prefix", ["module.", "model.", "backbone.", "encoder.", "module.encoder_q."])
def test_a_common_prefix_is_removed(small, prefix):
    net, own, tensors = small
    given = {prefix + key: value for key, value in tensors.items()}
    given["projector.weight"] = np.zeros(3, np.float32)
    fitted = fit_tensors(net, *own, given, "a file")
    assert (fitted.params["conv1"]["kernel"].transpose(3, 2, 0, 1) == tensors["conv1.weight"]).all()
    assert fitted.sentences == [
        f"Loaded {len(tensors)} of {len(tensors)} tensors from a file, whose names begin with {prefix!r}; left "
        "out 1 of other names (projector.weight)."
    ]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda t: t.update({"fc.weight": np.ones((1000, 512)), "fc.bias": np.ones(1000)}),
            "outputs 7 here, 1000 in the file",
        ),
        (lambda t: [t.pop(key) for key in ("fc.weight", "fc.bias")], "the file has none"),
        (lambda t: t.update({"fc.0.weight": t.pop("fc.weight")}), "made differently"),
        (lambda t: t.update({"fc.weight": np.ones((7, 1024))}), "made differently"),
    ],
)
def test_a_head_that_does_not_fit_starts_anew_and_is_said(small, change, sentence):
    net, (params, batch_stats), tensors = small
    params = {**params, "fc": {"kernel": np.full((512, 7), 0.25), "bias": np.full(7, 0.5)}}
    given = dict(tensors)
    change(given)
    fitted = fit_tensors(net, params, batch_stats, given, "a file")
    assert fitted.params["fc"]["kernel"] is params["fc"]["kernel"]
    assert (fitted.params["layer4"]["1"]["bn2"]["bias"] == tensors["layer4.1.bn2.bias"]).all()
    assert fitted.sentences[1].startswith("The head (fc) starts anew")
    assert sentence in fitted.sentences[1]


def test_a_two_unit_head_can_be_kept(small):
    _, _, tensors = small
    net = build_model("resnet18", image_shape=(32, 32, 3), outputs=1)
    given = {**tensors, "fc.weight": np.ones((2, 512)), "fc.bias": np.ones(2)}
    fitted = fit_tensors(net, *empty_weights(net), given, "a file")
    assert 'model.head = "softmax" would keep it' in fitted.sentences[1]
    assert fitted.head_outputs == 2


def test_every_tensor_that_does_not_fit_is_named(small):
    net, own, tensors = small
    given = dict(tensors)
    del given["layer1.0.conv1.weight"]
    for key in [key for key in given if key.startswith("layer4.1.bn2.")]:
        del given[key]
    given["layer5.0.conv1.weight"] = np.zeros((3, 3), np.float32)
    given["scale"] = np.zeros(1, np.float32)
    given["conv1.weight"] = np.zeros((64, 3, 3, 3), np.float32)
    given["bn1.bias"] = np.zeros(3, np.float32)
    with pytest.raises(UserError) as caught:
        fit_tensors(net, *own, given, "a file")
    assert str(caught.value) == (
        "a file does not fit the model 'resnet18': missing layer1.0.conv1.weight, layer4.1.bn2.*; not part of it "
        "layer5.0.conv1.weight, scale; of another shape conv1.weight (64x3x3x3 for 64x3x7x7), bn1.bias (3 for 64). "
        "Check model.name and model.options."
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_refused(small, value):
    net, own, tensors = small
    given = {**tensors, "bn1.running_var": np.full(64, value, np.float32)}
    with pytest.raises(UserError, match=r"not finite numbers in bn1\.running_var"):
        fit_tensors(net, *own, given, "a file")


def test_another_kind_of_net_is_refused(small):
    net, own, _ = small
    with pytest.raises(
        UserError, match=r"holds no weights of the model 'resnet18': its first tensor is a\.b"
    ):
        fit_tensors(net, *own, {"a.b": np.zeros(1)}, "a file")
    with pytest.raises(UserError, match="it holds no tensors"):
        fit_tensors(net, *own, {}, "a file")
    with pytest.raises(UserError, match="does not fit the model 'resnet18'"):
        fit_tensors(net, *own, case_weights("resnet50"), "a file")


@pytest.mark.parametrize("name", sorted({*model_names()} - {*case.SIZES}))
def test_every_net_goes_out_and_comes_back(name):
    side = 500 if name.startswith("melanoma") else 96
    net = build_model(name, image_shape=(side, side, 3), outputs=2)
    dice = np.random.default_rng(0)
    params, batch_stats = jax.tree.map(lambda leaf: dice.random(leaf.shape, np.float32), empty_weights(net))
    tensors = to_torchvision(net, params, batch_stats)
    fitted = fit_tensors(net, *empty_weights(net), tensors, "a file")
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), fitted[:2], (params, batch_stats)))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_losing_any_tensor_of_the_body_is_noticed(small, data):
    net, own, tensors = small
    lost = data.draw(st.sets(st.sampled_from([key for key in tensors if key[:2] != "fc"]), min_size=1))
    with pytest.raises(UserError) as caught:
        fit_tensors(net, *own, {key: v for key, v in tensors.items() if key not in lost}, "a file")
    named = str(caught.value).split("missing ")[1].split(". Check")[0].split(", ")
    covered = {
        key for key in tensors if any(key == n or (n[-1] == "*" and key.startswith(n[:-1])) for n in named)
    }
    assert covered == lost
