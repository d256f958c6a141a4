from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from local_hub import COMMIT, serve_hub

from pcam_jax.models.weight_files import read_weight_file, write_safetensors
from pcam_jax.runtime.errors import UserError

TENSORS = {
    "conv1.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2),
    "bn1.running_var": np.array([0.5, 2.0], np.float32),
    "bn1.num_batches_tracked": np.array(3, np.int64),
}


def test_safetensors_come_back_as_they_went(tmp_path):
    path = tmp_path / "weights.safetensors"
    turned = {**TENSORS, "turned": TENSORS["conv1.weight"].transpose(3, 0, 2, 1)}
    write_safetensors(path, turned, {"model": "resnet18"})
    read = read_weight_file(str(path))
    assert {key: (value.dtype, value.shape) for key, value in read.tensors.items()} == {
        key: (value.dtype, value.shape) for key, value in turned.items()
    }
    assert all((read.tensors[key] == value).all() for key, value in turned.items())
    assert read.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    with safetensors.safe_open(path, framework="np") as file:
        assert file.metadata() == {"format": "pt", "model": "resnet18"}


def test_half_precision_is_read(tmp_path):
    path = tmp_path / "half.safetensors"
    values = np.array([1.5, -2.25, 3.0])
    header = {
        "b": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]},
        "h": {"dtype": "F16", "shape": [3], "data_offsets": [6, 12]},
    }
    text = json.dumps(header).encode()
    body = values.astype(ml_dtypes.bfloat16).tobytes() + values.astype(np.float16).tobytes()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    tensors = read_weight_file(str(path)).tensors
    assert tensors["b"].astype(np.float32).tolist() == values.tolist()
    assert tensors["h"].astype(np.float32).tolist() == values.tolist()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.safetensors", None, "There is no file"),
        ("short.safetensors", b"\x08\0\0", "not a readable safetensors file"),
        ("page.safetensors", b"<!DOCTYPE html><html>Not found</html>", "not a readable safetensors file"),
        ("weights.onnx", b"x", "ends in .onnx"),
        ("weights", b"x", "ends in nothing"),
    ],
)
def test_an_unusable_file_is_refused_in_a_sentence(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        read_weight_file(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(UserError, match="is a folder but no run"):
        read_weight_file(str(tmp_path))


def test_without_torch_its_files_name_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    path = tmp_path / "weights.pth"
    path.write_bytes(b"anything")
    with pytest.raises(UserError, match=r"pip install 'pcam-jax\[torch\]'"):
        read_weight_file(str(path))


def test_files_of_torch_are_read_or_name_the_extra(tmp_path):
    path = tmp_path / "weights.pth"
    if importlib.util.find_spec("torch") is None:
        path.write_bytes(b"anything")
        with pytest.raises(UserError, match=r"pcam-jax\[torch\]"):
            read_weight_file(str(path))
        return
    import torch

    tensors = {key: torch.from_numpy(value.copy()) for key, value in TENSORS.items()}
    for nested in (tensors, {"state_dict": tensors, "epoch": 3}, {"model": tensors}):
        torch.save(nested, path)
        read = read_weight_file(str(path)).tensors
        assert read.keys() == TENSORS.keys()
        assert all((read[key] == value).all() for key, value in TENSORS.items())
    torch.save({"w": torch.tensor([1.5, 2.5], dtype=torch.bfloat16)}, path)
    assert read_weight_file(str(path)).tensors["w"].tolist() == [1.5, 2.5]
    for unusable, message in ((torch.nn.Linear(2, 2), "tensors alone"), ({"epoch": 3}, "no named tensors")):
        torch.save(unusable, path)
        with pytest.raises(UserError, match=message):
            read_weight_file(str(path))


READ_ALL = """
import json, sys
from pcam_jax.models.weight_files import read_weight_file
from pcam_jax.runtime.errors import UserError
for name in sys.argv[1:]:
    try:
        file = read_weight_file(name)
        print(json.dumps([sorted(file.tensors), file.revision]))
    except UserError as error:
        print(json.dumps(str(error)))
"""


def read_from_hub(endpoint, cache, *names, offline=False):
    """Answers of a process of its own, since the hub's client reads its environment when imported."""
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": "1" if offline else "0",
    }
    command = [sys.executable, "-W", "error", "-c", READ_ALL, *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_hub_is_read_by_repository_revision_and_file(tmp_path):
    one = safetensors.numpy.save({"a": np.ones(1, np.float32)})
    other = safetensors.numpy.save({"b": np.ones(1, np.float32)})
    repositories = {
        "owner/usual": {"config.json": b"{}", "model.safetensors": one, "extra.safetensors": other},
        "owner/single": {"README.md": b"", "weights.safetensors": other},
        "owner/many": {"one.safetensors": one, "two.safetensors": other},
        "owner/none": {"README.md": b""},
        "gated/net": {"model.safetensors": one},
    }
    with serve_hub(repositories) as endpoint:
        answers = read_from_hub(
            endpoint,
            tmp_path,
            "hf:owner/usual",
            "hf:owner/usual@v2:extra.safetensors",
            "hf:owner/single",
            "hf:owner/many",
            "hf:owner/none",
            "hf:gated/net",
            "hf:owner/absent",
            "hf:owner/usual@v9",
            "hf:owner/usual:absent.safetensors",
            "hf:owner/usual:a:b",
        )
    assert answers[:3] == [[["a"], COMMIT], [["b"], COMMIT], [["b"], COMMIT]]
    for answer, expected in zip(
        answers[3:],
        [
            "name a file after a colon, one of one.safetensors, two.safetensors",
            "holds no file of weights",
            "accept them on its page",
            "no such repository",
            "no such revision",
            "no such file",
            "write hf:<owner>/<repository>",
        ],
        strict=True,
    ):
        assert expected in answer
    # the server is gone: what was fetched comes from the cache, the rest is a sentence
    kept, lost = read_from_hub(endpoint, tmp_path, "hf:owner/usual", "hf:owner/other", offline=True)
    assert kept == [["a"], COMMIT]
    assert "is not in the cache and the hub cannot be reached" in lost
