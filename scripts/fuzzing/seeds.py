"""Sound inputs, from which damaged ones are made."""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from pcam_jax.data.store import write_store
from pcam_jax.models.weight_files import write_safetensors
from pcam_jax.run.checkpoint import PROGRESS, Checkpoints

SIDE = 12
IMAGE = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


def encoded(kind: str, **options: Any) -> bytes:
    """The image as a file."""
    file = io.BytesIO()
    Image.fromarray(IMAGE).save(file, kind, **options)
    return file.getvalue()


def zips() -> list[bytes]:
    """A set as a zip, stored and deflated."""
    contents = []
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", method) as zipped:
            zipped.writestr("train/a.tif", encoded("TIFF"))
            zipped.writestr("train_labels.csv", "id,label\na,1\n")
        contents.append(content.getvalue())
    return contents


def tars() -> list[bytes]:
    """A picture in a tar, plain and compressed."""
    contents = []
    for mode in ("w", "w:gz"):
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode=mode) as tarred:
            member = tarfile.TarInfo("a/b.png")
            member.size = len(encoded("PNG"))
            tarred.addfile(member, io.BytesIO(encoded("PNG")))
        contents.append(content.getvalue())
    return contents


def files_of_a_store() -> dict[str, bytes]:
    """A store of two images: the contents of its files by name."""
    table = pd.DataFrame({"id": ["a", "b"], "label": [0, 1]})
    with tempfile.TemporaryDirectory() as folder:
        store = write_store(Path(folder) / "store", np.stack([IMAGE, IMAGE[::-1]]), table, ("x", "y"))
        return {path.name: path.read_bytes() for path in store.path.iterdir()}


def progress_of_a_checkpoint() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        saved = Checkpoints(Path(folder))
        saved.save(3, {"a": np.zeros(2, np.float32)}, {"history": [], "control": {"epoch": 1}}, -1)
        saved.close()
        return Path(folder, "3", PROGRESS).read_bytes()


def weights() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "w.safetensors"
        write_safetensors(path, {"a": IMAGE.astype(np.float32)})
        return path.read_bytes()


def make_seeds(store: dict[str, bytes]) -> dict[str, list[bytes]]:
    """Sound inputs of each parser, given the files of a store."""
    point = {"temperature": 1.5, "threshold": 0.4, "criterion": "youden", "tta": "none", "step": 3}
    point["isotonic"] = {"knots": [0.1, 0.5], "values": [0.2, 0.6]}
    recipe = (
        b'[train]\nepochs = 3\nseed = 1\n[optimizer]\npeak_lr = 1e-3\nname = "adam"\n[augment]\nd4 = true\n'
    )
    space = b'[optimizer.peak_lr]\nlow = 1e-4\nhigh = 1e-2\nlog = true\n[optimizer.name]\nchoices = ["adam", "sgd"]\n'
    return {
        "tif": [encoded("TIFF"), encoded("TIFF", compression="tiff_adobe_deflate")],
        "picture": [encoded(kind) for kind in ("PNG", "JPEG", "BMP", "WEBP")],
        "zip": zips(),
        "tar": tars(),
        "labels": [b"id,label\na,1\nb,0\n"],
        "manifest": [json.dumps(json.loads(store["manifest.json"])).encode() + b"\n"],
        "index": [store["index.csv"]],
        "config": [recipe],
        "space": [space],
        "progress": [progress_of_a_checkpoint()],
        "history": [b"epoch,step,train_loss\n1,2,0.5\n2,4,nan\n"],
        "operating_point": [json.dumps(point).encode()],
        "submission": [b"id,label\na,0\nb,0\n"],
        "weights": [weights()],
    }
