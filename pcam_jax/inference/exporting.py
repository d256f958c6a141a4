"""Writing artifacts, each verified by running what was written."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pcam_jax.data.named import open_named_store
from pcam_jax.data.sample import sample_patches
from pcam_jax.inference.artifact import (
    FILES,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    OUTPUTS,
    manifest_digest,
)
from pcam_jax.inference.predictor import ExportedPredictor, Predictor, build_run_net, load_weights
from pcam_jax.inference.saliency import central_side
from pcam_jax.models.platform import portable_formulations
from pcam_jax.models.pretrained import to_torchvision, write_safetensors
from pcam_jax.models.registry import Net
from pcam_jax.run.folder import Run
from pcam_jax.run.operating_point import OperatingPoint, read_operating_point
from pcam_jax.runtime import accelerator
from pcam_jax.runtime.errors import UserError, require
from pcam_jax.runtime.files import atomic_write, sync_folder, sync_tree, write_json_atomic
from pcam_jax.training.network import build_network
from pcam_jax.training.state import to_named_arrays
from pcam_jax.training.steps import make_eval_step

TOLERANCE = 1e-5
"""Largest difference of a probability between an artifact and the run."""
PLATFORMS = ("cpu", "cuda")
_EXAMPLES = 24
_BATCHES = (1, 7, 16)  # sizes that an artifact is tried with
_TORCHVISION_FAMILIES = ("resnet", "wide_resnet", "densenet", "efficientnet")


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the folder.
        manifest: its manifest.
        difference: largest difference of a probability from the run's, on ``examples`` images.
        examples: how many.
        on: where they are from.
        arithmetic_note: a sentence where the artifact computes in another precision than the run; else empty.
    """

    path: Path
    manifest: dict[str, Any]
    difference: float
    examples: int
    on: str
    arithmetic_note: str


def export_run(run: Run, kind: str, output: Path) -> Exported:
    """Write a run's best weights as an artifact, and check it by running it.

    Args:
        run: the run.
        kind: ``stablehlo``, ``onnx`` or ``safetensors``.
        output: folder to make.

    Raises:
        UserError: ``output`` exists, the run cannot be loaded, a package is missing, or what was written answers
            otherwise than the run: then nothing is left.
    """
    if kind not in FILES:
        raise UserError(f"--format is {kind!r}: it must be one of {', '.join(FILES)}.")
    if output.exists():
        raise UserError(f"{output} exists already: choose another folder, or delete it first.")
    if not output.absolute().parent.is_dir():
        raise UserError(f"There is no folder {output.absolute().parent} for --output: make it first.")
    if kind == "stablehlo":
        require("flatbuffers", extra="export")
    elif kind == "onnx":
        require("onnx", extra="onnx")
        require("onnxruntime", extra="onnx")
    accelerator.configure()
    net, note = _exact_net(run, kind)
    weights, step, _ = load_weights(run, net)
    point = read_operating_point(run.path)
    reference = Predictor(net, weights, run.config.model.normalization, run.class_names, point)
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        details = _write_model(kind, partial / FILES[kind], net, weights, run, point)
        values = _manifest(run, kind, partial, net, step, point, details)
        write_json_atomic(partial / MANIFEST, values)
        images, source = verification_images(run, net.image_shape)
        difference = _verify(partial, reference, images)
        values["verified"] = {
            "examples": len(images),
            "from": source,
            "batch_sizes": list(_BATCHES),
            "largest_difference": difference,
            "tolerance": TOLERANCE,
        }
        values["digest"] = manifest_digest(values)
        write_json_atomic(partial / MANIFEST, values)
        sync_tree(partial)
        os.rename(partial, output)
        sync_folder(output.absolute().parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Exported(output, values, difference, len(images), source, note)


def answering(net: Net, weights: tuple[Any, Any], normalization: Any, point: OperatingPoint) -> Any:
    """The function that is exported: of images ``[b, H, W, 3] uint8`` to `OUTPUTS`.

    ``logits [b, outputs] float32`` as the network gives them; ``probs`` at the temperature, ``[b]`` of class 1 or
    ``[b, K] float32``; ``decisions [b] int32``, class numbers by the threshold, or the likeliest of several classes.
    """
    step = make_eval_step(net, normalization)
    params, batch_stats = jax.tree.map(jnp.asarray, weights)

    def answer(images: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        logits = step(params, batch_stats, images)
        scaled = logits * np.float32(1 / point.temperature)
        if logits.shape[1] > 2:
            probs = jax.nn.softmax(scaled, axis=1)
            return logits, probs, jnp.argmax(probs, axis=1).astype(jnp.int32)
        one = jax.lax.slice_in_dim(scaled, logits.shape[1] - 1, None, axis=1)  # plainer than a gather
        two_class = one if logits.shape[1] == 1 else one - jax.lax.slice_in_dim(scaled, 0, 1, axis=1)
        probs = jax.nn.sigmoid(jax.lax.squeeze(two_class, [1]))
        return logits, probs, (probs >= np.float32(point.threshold)).astype(jnp.int32)

    return answer


def verification_images(run: Run, image_shape: tuple[int, int, int]) -> tuple[np.ndarray, str]:
    """Images to try an artifact with, ``[n, H, W, 3] uint8``, and where they are from.

    Those of the run's own validation split where its store is still there; otherwise synthetic ones.
    """
    try:
        store = open_named_store(run.environment["data"]["store"])
        if store.digest == run.environment["data"]["digest"]:
            positions = run.positions(store, "validation")
            chosen = positions[np.linspace(0, len(positions) - 1, _EXAMPLES).astype(np.int64)]
            return store.gather(chosen), "the run's validation split"
    except UserError:
        pass
    height, width = image_shape[:2]
    patches = sample_patches(_EXAMPLES, image_size=max(height, width, 24)).images  # 24: the least it draws
    return np.ascontiguousarray(patches[:, :height, :width]), "the embedded sample"


def _exact_net(run: Run, kind: str) -> tuple[Net, str]:
    """The network; graphs compute in float32, since other runtimes' bfloat16 would differ in the third digit."""
    precision = run.config.train.precision
    if kind == "safetensors" or precision == "float32":
        return build_run_net(run), ""
    train = dataclasses.replace(run.config.train, precision="float32")
    config = dataclasses.replace(run.config, train=train)
    note = f"the run computes in {precision}, the artifact in float32"
    return build_network(config, run.image_shape, len(run.class_names)), note


def _write_model(
    kind: str, file: Path, net: Net, weights: tuple[Any, Any], run: Run, point: OperatingPoint
) -> dict[str, Any]:
    """Write the file; returns what the manifest says of the model beyond the common."""
    if kind == "safetensors":
        torch_names = net.name.startswith(_TORCHVISION_FAMILIES)
        if torch_names:
            tensors = to_torchvision(net, *weights)
        else:
            tensors = to_named_arrays({"params": weights[0], "batch_stats": weights[1]})
        write_safetensors(file, tensors)
        return {"weight_names": "torchvision" if torch_names else "dotted"}
    answer = answering(net, weights, run.config.model.normalization, point)
    # XLA's GPU backend rounds to TensorFloat-32 by default, which is no 1e-5
    with portable_formulations(), jax.default_matmul_precision("highest"):
        if kind == "onnx":
            from pcam_jax.inference.onnx_graph import to_onnx

            content, opset = to_onnx(answer, net.image_shape, OUTPUTS, net.name)
            details: dict[str, Any] = {"opset": opset}
        else:
            from jax import export

            (batch,) = export.symbolic_shape("batch")
            images = jax.ShapeDtypeStruct((batch, *net.image_shape), jnp.uint8)
            content = bytes(export.export(jax.jit(answer), platforms=PLATFORMS)(images).serialize())
            details = {"platforms": list(PLATFORMS)}
    with atomic_write(file, "wb") as stream:
        stream.write(content)
    return details


def _manifest(
    run: Run, kind: str, folder: Path, net: Net, step: int, point: OperatingPoint, details: dict[str, Any]
) -> dict[str, Any]:
    environment = run.environment
    data = environment["data"]
    probs: list[Any] = ["batch"] if len(run.class_names) == 2 else ["batch", len(run.class_names)]
    inside = kind != "safetensors"
    values: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "made_by": _versions("pcam-jax", "jax", "jaxlib", "onnx"),
        "input": {
            "name": "images",
            "dtype": "uint8",
            "shape": ["batch", *net.image_shape],
            "layout": "NHWC, colours in the order RGB",
            "normalization": run.config.model.normalization,
            "normalization_inside": inside,
            "central_square": central_side(net.image_shape),
        },
        "outputs": {
            "logits": {"dtype": "float32", "shape": ["batch", net.outputs]},
            "probs": {"dtype": "float32", "shape": probs, "meaning": _meaning(run.class_names)},
            "decisions": {"dtype": "int32", "shape": ["batch"], "meaning": "number of the class"},
        }
        if inside
        else {},
        "class_names": list(run.class_names),
        "operating_point": dataclasses.asdict(point),
        "model": {
            "name": net.name,
            "options": dict(run.config.model.options),
            "outputs": net.outputs,
            "parameters": net.param_count,
            "precision": str(np.dtype(net.dtype)),
            **details,
        },
        "training": {
            "step": step,
            "commit": environment.get("commit", ""),
            "data_digest": data["digest"],
            "prepared": data.get("prepared", {}),
            "examples_by_class": data["examples_by_class"]["train"],
        },
        "files": {
            path.name: {
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "bytes": path.stat().st_size,
            }
            for path in sorted(folder.iterdir())
        },
    }
    values["digest"] = manifest_digest(values)
    return values


def _meaning(class_names: tuple[str, ...]) -> str:
    if len(class_names) == 2:
        return f"calibrated probability of {class_names[1]}"
    return "calibrated probabilities of " + ", ".join(class_names)


def _verify(folder: Path, reference: Predictor, images: np.ndarray) -> float:
    """Largest difference of a probability between the artifact and the run.

    Raises:
        UserError: it is above `TOLERANCE`, or a decision differs without being on the threshold.
    """
    expected = reference(images)
    loaded = Predictor.load(folder)
    pairs = [(loaded(images), expected)]
    if isinstance(loaded, ExportedPredictor):
        first = 0
        threshold = reference.operating_point.threshold
        for size in _BATCHES:
            batch = slice(first, first + size)
            found = loaded.engine.answer(images[batch])
            pairs.append((np.asarray(found["probs"]), expected[batch]))
            wanted = expected[batch] >= threshold if expected.ndim == 1 else expected[batch].argmax(axis=1)
            margin = np.abs(expected[batch] - threshold) if expected.ndim == 1 else _margins(expected[batch])
            if np.any((np.asarray(found["decisions"]) != wanted) & (margin > TOLERANCE)):
                raise UserError("The exported model's decisions differ from the run's: nothing was written.")
            first += size
    difference = max(float(np.max(np.abs(found - wanted), initial=0.0)) for found, wanted in pairs)
    if not difference <= TOLERANCE:
        raise UserError(
            f"The exported model's probabilities differ from the run's by {difference:.1g}, more than {TOLERANCE:g}: "
            "nothing was written."
        )
    return difference


def _margins(probs: np.ndarray) -> np.ndarray:
    best = np.sort(probs, axis=1)
    return np.asarray(best[:, -1] - best[:, -2])


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
