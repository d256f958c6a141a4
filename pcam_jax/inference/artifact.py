"""Exported models: a folder with a manifest, that answers without the run and its configuration.

``manifest.json`` says what goes in, what comes out, how to decide, and the SHA-256 of every file and of itself.
Nothing in an artifact is a pickle; it is checked before anything in it is used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pcam_jax.models.pretrained import fit_tensors
from pcam_jax.models.registry import Net, build_model
from pcam_jax.models.weight_files import read_weight_file
from pcam_jax.run.operating_point import OperatingPoint, parse_operating_point
from pcam_jax.runtime import accelerator
from pcam_jax.runtime.errors import UserError, require
from pcam_jax.training.state import from_named_arrays

FORMAT = "pcam_jax artifact"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
FILES = {"stablehlo": "model.stablehlo", "onnx": "model.onnx", "safetensors": "model.safetensors"}
"""The file of each kind of artifact."""
OUTPUTS = ("logits", "probs", "decisions")
"""Names of what an exported function returns, in order."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What an artifact says of itself.

    Attributes:
        kind: ``stablehlo``, ``onnx`` or ``safetensors``.
        class_names: by label.
        image_shape: (H, W, 3).
        outputs: number of logits.
        operating_point: temperature, threshold and how they were chosen.
        values: everything, as in the file.
    """

    kind: str
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    outputs: int
    operating_point: OperatingPoint
    values: dict[str, Any]


def is_artifact(path: str | Path) -> bool:
    """Whether a folder is an exported model, of whatever version."""
    manifest = Path(path) / MANIFEST
    if not manifest.is_file():
        return False
    try:
        values = json.loads(manifest.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return any((Path(path) / name).is_file() for name in FILES.values())
    return isinstance(values, dict) and values.get("format") == FORMAT


def manifest_digest(values: dict[str, Any]) -> str:
    """SHA-256 of a manifest without its own digest, hex."""
    content = {key: value for key, value in values.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def read_manifest(path: str | Path) -> Manifest:
    """Read and check the manifest and every file it names.

    Raises:
        UserError: the artifact is damaged, altered, incomplete, or of a newer format.
    """
    folder = Path(path)
    try:
        values = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version = int(values["format_version"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / MANIFEST} is damaged ({error}): export the model again.") from None
    if version > FORMAT_VERSION:
        raise UserError(
            f"{folder} is an artifact of format {version}; this version of pcam_jax reads formats up to "
            f"{FORMAT_VERSION}: install a newer one."
        )
    if values.get("digest") != manifest_digest(values):
        raise UserError(f"{folder / MANIFEST} was altered after the export: export the model again.")
    for name, facts in values["files"].items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{folder} lacks its file {name}: copy it again, or export the model again.")
        if _sha256(file) != facts["sha256"]:
            raise UserError(
                f"{file} was altered or damaged after the export: copy it again, or export again."
            )
    try:
        height, width, channels = values["input"]["shape"][1:]
        return Manifest(
            kind=values["kind"],
            class_names=tuple(values["class_names"]),
            image_shape=(int(height), int(width), int(channels)),
            outputs=int(values["model"]["outputs"]),
            operating_point=parse_operating_point(values["operating_point"]),
            values=values,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / MANIFEST} is damaged ({error}): export the model again.") from None


@dataclasses.dataclass(frozen=True)
class Artifact:
    """An exported model ready to compute: either an engine, or a network and its weights.

    Attributes:
        manifest: what it says of itself.
        engine: of a StableHLO or ONNX artifact.
        net: of a safetensors artifact.
        weights: its (params, batch_stats).
    """

    manifest: Manifest
    engine: StableHlo | Onnx | None = None
    net: Net | None = None
    weights: tuple[Any, Any] | None = None


def open_artifact(path: str | Path) -> Artifact:
    """Check an exported model and load it.

    Raises:
        UserError: see `read_manifest`; or a package that its kind needs is missing, or cannot read it.
    """
    manifest = read_manifest(path)
    file = Path(path) / FILES[manifest.kind]
    if manifest.kind == "safetensors":
        net = _built(manifest)
        weights = _read_weights(net, file, manifest.values["model"]["weight_names"])
        return Artifact(manifest, net=net, weights=weights)
    engine = StableHlo(file, manifest) if manifest.kind == "stablehlo" else Onnx(file)
    return Artifact(manifest, engine=engine)


class StableHlo:
    """An exported JAX function on the first device."""

    def __init__(self, file: Path, manifest: Manifest) -> None:
        require("flatbuffers", extra="export")
        from jax import export

        try:
            exported = export.deserialize(bytearray(file.read_bytes()))
        except Exception as error:  # flatbuffers and jax raise whatever they meet
            made_by = manifest.values["made_by"]["jax"]
            raise UserError(
                f"{file} was written by jax {made_by} and cannot be read by {jax.__version__} "
                f"({type(error).__name__}): install that version, or export again."
            ) from None
        platform = jax.default_backend().replace("gpu", "cuda")
        if platform not in exported.platforms:
            raise UserError(
                f"{file} is for {', '.join(exported.platforms)}, not {platform}: export it on such a machine."
            )
        self._call = jax.jit(exported.call, compiler_options=accelerator.compiler_options())
        self._device = jax.local_devices()[0]

    def place(self, images: np.ndarray) -> jax.Array:
        """A batch ``[B, H, W, 3] uint8`` where the function takes it."""
        return jax.device_put(images, self._device)

    def answer(self, images: Any) -> dict[str, Any]:
        """All outputs of a batch ``[B, H, W, 3] uint8`` by their names."""
        return dict(zip(OUTPUTS, self._call(images), strict=True))

    def run(self, weights: tuple[Any, Any], images: jax.Array) -> jax.Array:
        """Logits ``[B, outputs] float32`` of a placed batch; the weights are inside."""
        return self.answer(images)["logits"]


class Onnx:
    """An ONNX graph in onnxruntime."""

    def __init__(self, file: Path) -> None:
        runtime = require("onnxruntime", extra="onnx")
        options = runtime.SessionOptions()
        options.log_severity_level = 3  # warnings about what it optimised away
        preferred = ("CUDAExecutionProvider", "CPUExecutionProvider")
        providers = [name for name in preferred if name in runtime.get_available_providers()]
        try:
            self._session = runtime.InferenceSession(str(file), options, providers=providers)
        except Exception as error:  # its exceptions share no public base class
            raise UserError(
                f"onnxruntime {runtime.__version__} cannot load {file} ({type(error).__name__}): install a newer one."
            ) from None

    def place(self, images: np.ndarray) -> Any:
        """A batch ``[B, H, W, 3] uint8`` where the function takes it."""
        return np.asarray(images)

    def answer(self, images: Any) -> dict[str, Any]:
        """All outputs of a batch ``[B, H, W, 3] uint8`` by their names."""
        found = self._session.run(list(OUTPUTS), {"images": np.asarray(images)})
        return dict(zip(OUTPUTS, found, strict=True))

    def run(self, weights: tuple[Any, Any], images: Any) -> Any:
        """Logits ``[B, outputs] float32`` of a placed batch; the weights are inside."""
        return self.answer(images)["logits"]


def _built(manifest: Manifest) -> Net:
    model = manifest.values["model"]
    return build_model(
        model["name"],
        image_shape=manifest.image_shape,
        outputs=manifest.outputs,
        dtype=np.dtype(model["precision"]),
        **model["options"],
    )


def _read_weights(net: Net, file: Path, names: str) -> tuple[Any, Any]:
    tensors = read_weight_file(str(file)).tensors
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    if names == "torchvision":
        params, batch_stats = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
        fitted = fit_tensors(net, params, batch_stats, tensors, str(file))
        return fitted.params, fitted.batch_stats
    filled = from_named_arrays({"params": shapes[0], "batch_stats": shapes[1]}, tensors)
    return filled["params"], filled["batch_stats"]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
