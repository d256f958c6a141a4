"""Exported models: they answer as the run does, alone, and a changed one is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
import pytest
import safetensors.numpy
import tiny

from pcam_jax.data.store import open_store
from pcam_jax.export import main
from pcam_jax.inference import artifact, exporting
from pcam_jax.inference.predictor import Predictor
from pcam_jax.models.registry import build_model
from pcam_jax.run.folder import open_run
from pcam_jax.run.operating_point import OperatingPoint, write_operating_point
from pcam_jax.runtime.errors import UserError

Verb = Callable[..., subprocess.CompletedProcess[str]]

KINDS = ["stablehlo", "onnx", "safetensors"]


@pytest.fixture(scope="module")
def calibrated(tiny_run: Path, tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a temperature and a threshold of its own, above which half of the images lie."""
    run = Path(shutil.copytree(tiny_run, tmp_path_factory.mktemp("calibrated") / "run"))
    step = open_run(run).best_checkpoint()[0].step
    write_operating_point(run, OperatingPoint(temperature=0.2, step=step))
    middle = float(np.median(Predictor.load(run)(open_store(tiny_store).gather(np.arange(70)))))
    write_operating_point(
        run, OperatingPoint(temperature=0.2, threshold=middle, criterion="youden", step=step)
    )
    return run


@pytest.fixture(scope="module")
def exported(calibrated: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The artifact of a kind, made once; copy it before you change it."""
    folder = tmp_path_factory.mktemp("exported")

    def make(kind: str) -> Path:
        if not (folder / kind).exists():
            main([str(calibrated), "--format", kind, "--output", str(folder / kind)])
        return folder / kind

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_an_artifact_answers_as_its_run(
    kind: str, exported: Callable[[str], Path], calibrated: Path, tiny_store: Path
) -> None:
    images = open_store(tiny_store).gather(np.arange(70))
    run, alone = Predictor.load(calibrated), Predictor.load(exported(kind))
    for count in (70, 1, 0):
        np.testing.assert_allclose(alone(images[:count]), run(images[:count]), atol=1e-6)
    assert alone.class_names == run.class_names
    assert alone.operating_point == run.operating_point
    assert (alone.image_shape, alone.step) == (run.image_shape, run.step)
    assert alone.training_counts == run.training_counts
    averaged = Predictor.load(exported(kind), tta="d4")
    np.testing.assert_allclose(averaged(images), Predictor.load(calibrated, tta="d4")(images), atol=1e-6)
    assert any("--tta d4" in remark for remark in averaged.remarks)
    np.testing.assert_allclose(
        np.asarray(alone.dispatch(images[:4])), np.asarray(run.dispatch(images[:4])), atol=1e-5
    )
    assert averaged.fingerprint() != alone.fingerprint()


def test_probabilities_and_decisions_are_inside(
    exported: Callable[[str], Path], calibrated: Path, tiny_store: Path
) -> None:
    from jax import export

    images = open_store(tiny_store).gather(np.arange(33))
    run = Predictor.load(calibrated)
    expected = run(images)
    function = export.deserialize(bytearray((exported("stablehlo") / "model.stablehlo").read_bytes()))
    assert set(function.platforms) == {"cpu", "cuda"}
    logits, probs, decisions = function.call(images)
    assert logits.shape == (33, 1)
    np.testing.assert_allclose(probs, expected, atol=1e-6)
    np.testing.assert_array_equal(decisions, expected >= run.operating_point.threshold)
    assert 0 < np.sum(decisions) < 33


@pytest.mark.parametrize("kind", KINDS)
def test_the_manifest_says_what_there_is(kind: str, exported: Callable[[str], Path]) -> None:
    values = json.loads((exported(kind) / "manifest.json").read_text())
    assert values["input"]["shape"] == ["batch", *tiny.IMAGE_SHAPE]
    assert values["class_names"] == ["class0", "class1"]
    assert values["operating_point"]["temperature"] == 0.2
    assert values["verified"]["largest_difference"] <= 1e-5
    assert values["verified"]["from"] == "the run's validation split"
    assert values["model"]["parameters"] == tiny_parameters()
    assert sorted(os.listdir(exported(kind))) == sorted(["manifest.json", *values["files"]])


def tiny_parameters() -> int:
    return build_model("tiny", image_shape=tiny.IMAGE_SHAPE, outputs=1).param_count


def test_from_the_command_line(verb: Verb, calibrated: Path, tiny_store: Path, tmp_path: Path) -> None:
    """An exported model needs neither its run nor the store it was trained on."""
    run = Path(shutil.copytree(calibrated, tmp_path / "run"))
    done = verb("export", run, "--format", "stablehlo", "--output", tmp_path / "model")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert (
        "Checked on 24 images of the run's validation split: probabilities differ by at most" in done.stdout
    )
    expected = tmp_path / "run.csv"
    assert verb("predict", run, tiny_store, "--output", expected).returncode == 0
    shutil.rmtree(run)
    done = verb("predict", tmp_path / "model", tiny_store, "--output", tmp_path / "alone.csv")
    assert done.returncode == 0, done.stderr
    assert "in training" in done.stdout
    frames = [pd.read_csv(path)["label"] for path in (expected, tmp_path / "alone.csv")]
    np.testing.assert_allclose(*frames, atol=1e-6)


def test_weights_in_torchvisions_names(tmp_path: Path, tiny_run: Path) -> None:
    net = build_model("resnet_small", image_shape=(32, 32, 3), outputs=1)
    weights = net.init(jax.random.key(0))
    details = exporting._write_model(
        "safetensors", tmp_path / "m.safetensors", net, weights, open_run(tiny_run), OperatingPoint()
    )
    assert details == {"weight_names": "torchvision"}
    names = set(safetensors.numpy.load_file(tmp_path / "m.safetensors"))
    assert {"conv1.weight", "layer1.0.bn1.running_mean", "fc.bias"} <= names
    found = artifact._read_weights(net, tmp_path / "m.safetensors", "torchvision")
    jax.tree.map(np.testing.assert_array_equal, found, weights)


def test_several_classes_and_no_store(tmp_path: Path, train_tiny: Callable[..., Any]) -> None:
    store = tiny.make_tiny_store(tmp_path / "store", classes=3)
    run = train_tiny(tmp_path / "run", store=store, model__head="softmax", train__epochs=1)
    images = open_store(store).gather(np.arange(9))
    shutil.rmtree(store)
    main([str(run.path), "--output", str(tmp_path / "model")])
    alone = Predictor.load(tmp_path / "model")
    np.testing.assert_allclose(alone(images), Predictor.load(run.path)(images), atol=1e-6)
    assert alone(images).shape == (9, 3)
    manifest = json.loads((tmp_path / "model/manifest.json").read_text())
    assert manifest["verified"]["from"] == "the embedded sample"


def test_a_run_in_bfloat16_is_exported_in_float32(
    tmp_path: Path, train_tiny: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = train_tiny(tmp_path / "run", train__precision="bfloat16", train__epochs=1)
    main([str(run.path), "--output", str(tmp_path / "model")])
    assert "the run computes in bfloat16, the artifact in float32" in capsys.readouterr().out
    assert json.loads((tmp_path / "model/manifest.json").read_text())["model"]["precision"] == "float32"


def altered(folder: Path, how: str) -> None:
    manifest = folder / "manifest.json"
    values = json.loads(manifest.read_text())
    model = next(iter(values["files"]))
    if how == "file":
        content = bytearray((folder / model).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / model).write_bytes(content)
    elif how == "no file":
        (folder / model).unlink()
    elif how == "threshold":
        values["operating_point"]["threshold"] = 0.99
        manifest.write_text(json.dumps(values))
    elif how == "newer":
        manifest.write_text(json.dumps({**values, "format_version": 2}))
    elif how == "cut":
        manifest.write_text(manifest.read_text()[:100])
    elif how == "unreadable":
        (folder / model).write_bytes(b"from another version")
        values["files"][model]["sha256"] = artifact._sha256(folder / model)
        manifest.write_text(json.dumps({**values, "digest": artifact.manifest_digest(values)}))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("file", "was altered or damaged after the export"),
        ("no file", "lacks its file model"),
        ("threshold", "manifest.json was altered after the export"),
        ("newer", "is an artifact of format 2"),
        ("cut", "manifest.json is damaged"),
        ("unreadable", "cannot be read|not a readable|cannot load"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_artifact_is_refused(
    kind: str, how: str, words: str, exported: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(exported(kind), tmp_path / "model"))
    altered(folder, how)
    with pytest.raises(UserError, match=words):
        Predictor.load(folder)


def test_what_differs_is_deleted(calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = exporting.answering
    # an export that forgets the temperature
    monkeypatch.setattr(
        exporting, "answering", lambda *rest: honest(*rest[:3], OperatingPoint(threshold=rest[3].threshold))
    )
    with pytest.raises(UserError, match=r"differ"):
        main([str(calibrated), "--output", str(tmp_path / "model")])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{run}", "--output", "{run}"], "exists already"),
        (["{run}", "--output", "{tmp}/no/where"], "There is no folder"),
        (["{tmp}/none", "--output", "{tmp}/model"], "There is no run"),
    ],
)
def test_mistakes(calibrated: Path, tmp_path: Path, arguments: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        main([argument.format(run=calibrated, tmp=tmp_path) for argument in arguments])


def test_a_store_is_no_artifact(tiny_store: Path) -> None:
    with pytest.raises(UserError, match="is not a run made by"):
        Predictor.load(tiny_store)
