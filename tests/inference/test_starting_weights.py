"""What model.init_from does to a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny

from pcam_jax.config.files import load_config
from pcam_jax.inference.predictor import build_run_net, load_weights
from pcam_jax.inference.starting_weights import load_starting_weights
from pcam_jax.models.pretrained import to_torchvision, write_safetensors
from pcam_jax.models.registry import build_model
from pcam_jax.run.folder import open_run
from pcam_jax.runtime.errors import UserError

ONE_EPOCH: dict[str, Any] = {"train__epochs": 1, "optimizer__peak_lr": 0.005}


@pytest.fixture
def weights_file(tiny_run: Path, tmp_path: Path) -> Path:
    """The tiny run's weights as safetensors."""
    run = open_run(tiny_run)
    net = build_run_net(run)
    write_safetensors(tmp_path / "tiny.safetensors", to_torchvision(net, *load_weights(run, net)[0]))
    return tmp_path / "tiny.safetensors"


def starting(init_from: object, store: Path, *, outputs: int = 1, **overrides: Any) -> Any:
    config = load_config(None, tiny.settings(store, model__init_from=str(init_from), **overrides))
    return load_starting_weights(config, build_model("tiny", image_shape=tiny.IMAGE_SHAPE, outputs=outputs))


def same(one: Any, other: Any) -> bool:
    return jax.tree.all(
        jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), one, other)
    )


def test_a_run_gives_what_it_evaluates_and_a_file_the_same(
    tiny_run: Path, weights_file: Path, tiny_store: Path
) -> None:
    run = open_run(tiny_run)
    expected = load_weights(run, build_run_net(run))[0]
    from_run, from_file = starting(tiny_run, tiny_store), starting(weights_file, tiny_store)
    assert same(from_run.weights, expected)
    assert same(from_file.weights, expected)
    assert from_run.sentences == [f"Loaded 10 of 10 tensors from {tiny_run}."]
    assert len(from_run.record["digest"]) == len(from_file.record["digest"]) == 64


def test_a_head_of_other_size_starts_as_drawn(tiny_run: Path, tiny_store: Path) -> None:
    found = starting(tiny_run, tiny_store, outputs=2, train__seed=5)
    drawn, _ = build_model("tiny", image_shape=tiny.IMAGE_SHAPE, outputs=2).init(jax.random.key(5))
    assert same(found.weights[0]["output"], drawn["output"])
    assert not same(found.weights[0]["dense1"], drawn["dense1"])
    assert found.sentences[1] == "The head (output) starts anew: outputs 2 here, 1 in the file."


def test_another_pixel_scaling_is_pointed_out(tiny_run: Path, tiny_store: Path) -> None:
    advice = starting(tiny_run, tiny_store, model__normalization="imagenet").sentences[-1]
    assert advice == (
        f'{tiny_run} was trained with normalization "unit", and this run uses "imagenet": consider '
        'model.normalization = "unit".'
    )


def test_training_begins_there_says_so_and_keeps_the_record(
    tiny_run: Path, weights_file: Path, tmp_path: Path, train_tiny: Callable[..., Any]
) -> None:
    said: list[str] = []
    path = tmp_path / "run"
    # nothing moves at such a rate, so that the end shows the beginning
    run = train_tiny(
        path, say=said.append, model__init_from=str(weights_file), train__epochs=1, optimizer__name="sgd",
        optimizer__peak_lr=1e-30,
    )  # fmt: skip
    assert f"Loaded 10 of 10 tensors from {weights_file}." in said
    expected = load_weights(open_run(tiny_run), build_run_net(run))[0]
    arrays = tiny.final_arrays(path)
    assert np.array_equal(arrays["params.conv1.kernel"], expected[0]["conv1"]["kernel"])
    assert np.array_equal(arrays["params.output.bias"], expected[0]["output"]["bias"])
    record = json.loads((path / "environment.json").read_text())["init_from"]
    assert record["name"] == str(weights_file)
    assert record["loaded"] == f"Loaded 10 of 10 tensors from {weights_file}."


def test_a_resumed_run_never_reads_them_again(
    weights_file: Path, tmp_path: Path, train_tiny: Callable[..., Any]
) -> None:
    settings = {**ONE_EPOCH, "train__epochs": 2, "model__init_from": str(weights_file), "checkpoint__keep": 5}
    train_tiny(tmp_path / "whole", **settings)
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    run = open_run(tmp_path / "run")
    run.checkpoints.remove(run.checkpoints.steps()[-1])
    (run.path / "result.json").unlink()
    weights_file.unlink()
    train_tiny(run.path, resume=True, **settings)
    assert tiny.same_history(tmp_path / "whole", run.path)
    assert tiny.differing_arrays(tiny.final_arrays(tmp_path / "whole"), tiny.final_arrays(run.path)) == []


def test_a_run_without_a_checkpoint_needs_the_same_weights(
    weights_file: Path, tmp_path: Path, train_tiny: Callable[..., Any]
) -> None:
    settings = {**ONE_EPOCH, "model__init_from": str(weights_file)}
    run = train_tiny(tmp_path / "run", **settings)
    before = tiny.final_arrays(run.path)
    shutil.rmtree(run.path / "checkpoints")
    (run.path / "result.json").unlink()
    kept = weights_file.read_bytes()
    weights_file.write_bytes(kept.replace(b"pt", b"qt"))  # the same tensors, another file
    with pytest.raises(UserError, match="has changed since"):
        train_tiny(run.path, resume=True, **settings)
    weights_file.write_bytes(kept)
    train_tiny(run.path, resume=True, **settings)
    assert tiny.differing_arrays(before, tiny.final_arrays(run.path)) == []


def test_weights_that_do_not_fit_leave_no_run_behind(tmp_path: Path, train_tiny: Callable[..., Any]) -> None:
    path = tmp_path / "other.safetensors"
    write_safetensors(path, {"conv1.weight": np.zeros((4, 3, 3, 3), np.float32)})
    with pytest.raises(UserError, match=r"does not fit the model 'tiny': missing conv1\.bias"):
        train_tiny(tmp_path / "run", **ONE_EPOCH, model__init_from=str(path))
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == [".lock"]
