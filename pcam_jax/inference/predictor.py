"""A trained run as a function from images to probabilities."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import numpy as np

from pcam_jax.data.loader import EvalLoader, ImageSource
from pcam_jax.inference.artifact import Artifact, Onnx, StableHlo, is_artifact, open_artifact
from pcam_jax.inference.forward import Collector, Forward
from pcam_jax.metrics.recalibration import apply_temperature
from pcam_jax.models.registry import Net
from pcam_jax.run.checkpoint import leaf_digest
from pcam_jax.run.folder import Run, open_run
from pcam_jax.run.operating_point import OperatingPoint, read_operating_point
from pcam_jax.runtime import accelerator, distributed, sharding
from pcam_jax.runtime.errors import UserError
from pcam_jax.runtime.signals import Stop
from pcam_jax.training.averaging import keeps_average
from pcam_jax.training.network import build_network
from pcam_jax.training.optimizer import make_optimizer
from pcam_jax.training.state import TrainState, from_named_arrays, initial_state
from pcam_jax.training.steps import evaluation_weights

Tta = Literal["none", "d4"]
BATCH_SIZE = 128
"""Images a device takes at once; the last batch is padded, so that one shape is compiled."""


class Engine(Protocol):
    """What computes logits: `Forward`, or an exported function."""

    def place(self, images: np.ndarray) -> jax.Array:
        """A batch ``[B, H, W, 3] uint8`` on the device."""

    def run(self, weights: tuple[Any, Any], images: jax.Array) -> jax.Array:
        """Logits ``[B, outputs] float32``, without waiting."""


class Predictor:
    """Probabilities of a trained network; get one from `Predictor.load`.

    Args:
        net: the network.
        weights: (params, batch_stats) as nested dicts of arrays.
        normalization: pixel scaling it was trained with.
        class_names: by label.
        operating_point: temperature and threshold.
        tta: ``d4`` averages the probabilities over the eight symmetries of the square (four for oblong images).
        remarks: sentences about how it was loaded.
    """

    def __init__(
        self,
        net: Net,
        weights: tuple[Any, Any],
        normalization: Any,
        class_names: tuple[str, ...],
        operating_point: OperatingPoint,
        *,
        tta: Tta = "none",
        remarks: Sequence[str] = (),
    ) -> None:
        mesh = sharding.make_local_mesh()  # several processes predict shares of their own
        self.net = net
        self.normalization = normalization
        self.class_names = class_names
        self.operating_point = operating_point
        self.tta = tta
        self.remarks = list(remarks)
        self.step: int | None = None
        """Training step of the weights, where they come from a run."""
        self.prepared: dict[str, Any] = {}
        """How the training images were made (``size``, ``fit``), where that is known."""
        self.training_counts: list[int] = []
        """Training examples of each class, where known."""
        self.weights = sharding.put(weights, sharding.replicated(mesh))
        self._forward: Engine = Forward(net, normalization, mesh)
        self._outputs, self._image_shape = net.outputs, net.image_shape
        self.batch_size = BATCH_SIZE * mesh.size
        """Images in a call, over the devices of this process."""

    @classmethod
    def load(cls, path: str | Path, *, tta: Tta = "none") -> Predictor:
        """The best weights of a run (averaged ones where it averages), with its temperature and threshold.

        Args:
            path: a run folder, of which neither the data nor the raw files are needed, or an artifact that
                `python -m pcam_jax.export` wrote, which needs nothing else.
            tta: test-time augmentation.

        Raises:
            UserError: it is neither, a run without a readable checkpoint, or an artifact that was altered.
        """
        accelerator.configure()
        if is_artifact(path):
            return _of_artifact(open_artifact(path), tta)
        run = open_run(path)
        net = build_run_net(run)
        weights, step, remarks = load_weights(run, net)
        point = read_operating_point(run.path)
        predictor = cls(
            net,
            weights,
            run.config.model.normalization,
            run.class_names,
            point,
            tta=tta,
            remarks=[*remarks, *_stale(point, step, tta)],
        )
        predictor.step = step
        data = run.environment["data"]
        predictor.prepared = dict(data.get("prepared", {}))
        predictor.training_counts = list(data["examples_by_class"]["train"])
        return predictor

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, 3) of the images it takes."""
        return self._image_shape

    def fingerprint(self) -> str:
        """Differs between predictors that may answer differently: weights, calibration, symmetries, batches."""
        digest = hashlib.sha256()
        settings = self.net.name, self.tta, self.operating_point.temperature, self.batch_size
        digest.update(repr(settings).encode())
        for leaf in jax.tree.leaves(self.weights):
            digest.update(leaf_digest(np.asarray(leaf)).encode())
        return digest.hexdigest()

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Calibrated probabilities of images in memory.

        Args:
            images: ``[N, H, W, 3] uint8``, or one ``[H, W, 3]``.

        Returns:
            Probability of class 1, ``[N] float32``, or of each class, ``[N, K] float32``, for more than two.

        Raises:
            UserError: another dtype or shape.
        """
        images = np.asarray(images)
        if images.ndim == 3:
            images = images[None]
        if images.dtype != np.uint8 or images.shape[1:] != self.image_shape:
            raise UserError(
                f"Images are {images.dtype} of shape {images.shape}: the model takes uint8 "
                f"[N, {', '.join(map(str, self.image_shape))}]."
            )
        return self.predict(_ArraySource(images), np.arange(len(images)))

    def predict(self, source: ImageSource, positions: np.ndarray, stop: Stop | None = None) -> np.ndarray:
        """Calibrated probabilities of images in a store or another source, read in batches.

        Args:
            source: where they are.
            positions: ``[N]`` which of them, in order.
            stop: polled between batches.

        Returns:
            As `__call__`.
        """
        return self.average(self.logits(source, positions, self.symmetries(), stop))

    def average(self, logits: Sequence[np.ndarray]) -> np.ndarray:
        """Mean calibrated probabilities over symmetries, ``[N]`` or ``[N, K] float32``, of `logits`' results."""
        temperature = self.operating_point.temperature
        return np.mean([apply_temperature(one, temperature) for one in logits], axis=0).astype(np.float32)

    def logits(
        self,
        source: ImageSource,
        positions: np.ndarray,
        symmetries: Sequence[int] = (0,),
        stop: Stop | None = None,
    ) -> list[np.ndarray]:
        """Uncalibrated logits, ``[N, outputs] float32`` for each wanted symmetry of the images.

        Every batch is read once however many symmetries are asked for. Several processes, which must all call
        this alike, take whole batches each and get all results, equal bit for bit to those of one process.
        """
        shares = batch_shares(len(positions), self.batch_size, jax.process_count())
        first, last = shares[jax.process_index()]
        batches = EvalLoader(source, np.asarray(positions)[first:last], self.batch_size)
        results = [Collector() for _ in symmetries]
        for batch in batches:
            if stop is not None:
                stop.check()
            images = self._forward.place(batch["images"])
            for symmetry, result in zip(symmetries, results, strict=True):
                turned = images if symmetry == 0 else _turn(images, symmetry)
                result.add(self._forward.run(self.weights, turned), batch["mask"])
        counts = [last - first for first, last in shares]
        return [distributed.gather_rows(result.finish(self._outputs), counts) for result in results]

    def dispatch(self, images: np.ndarray) -> jax.Array:
        """Uncalibrated logits ``[B, outputs] float32`` of one batch, without waiting for them.

        Args:
            images: ``[B, H, W, 3] uint8``; a program is compiled for each B, which the devices must be able to share.
        """
        return self._forward.run(self.weights, self._forward.place(images))

    def symmetries(self) -> tuple[int, ...]:
        """The numbers of the symmetries that are averaged."""
        if self.tta == "none":
            return (0,)
        square = self.image_shape[0] == self.image_shape[1]
        return tuple(range(8 if square else 4))


class ExportedPredictor(Predictor):
    """A predictor whose network is an exported function: it has no `net` to look into, and else does all.

    Args:
        engine: what computes.
        artifact: where it is from.
        tta: test-time augmentation.
    """

    def __init__(self, engine: StableHlo | Onnx, artifact: Artifact, tta: Tta) -> None:
        manifest = artifact.manifest
        self.normalization = manifest.values["input"]["normalization"]
        self.class_names = manifest.class_names
        self.operating_point = manifest.operating_point
        self.tta = tta
        self.remarks = []
        self.weights = ({}, {})
        self.engine = engine
        self._forward = engine
        self._outputs, self._image_shape = manifest.outputs, manifest.image_shape
        self.batch_size = BATCH_SIZE
        self._digest = manifest.values["digest"]

    def fingerprint(self) -> str:
        """See `Predictor.fingerprint`."""
        return f"{self._digest} {self.tta} {self.batch_size}"


def _of_artifact(artifact: Artifact, tta: Tta) -> Predictor:
    """A predictor from an exported model alone."""
    manifest, point = artifact.manifest, artifact.manifest.operating_point
    predictor: Predictor
    if artifact.engine is not None:
        predictor = ExportedPredictor(artifact.engine, artifact, tta)
    else:
        assert artifact.net is not None
        assert artifact.weights is not None
        scheme = manifest.values["input"]["normalization"]
        predictor = Predictor(artifact.net, artifact.weights, scheme, manifest.class_names, point, tta=tta)
    training = manifest.values["training"]
    predictor.step = training["step"]
    predictor.prepared = dict(training["prepared"])
    predictor.training_counts = list(training["examples_by_class"])
    predictor.remarks += _other_tta(point, tta)
    return predictor


def batch_shares(count: int, batch_size: int, parts: int) -> list[tuple[int, int]]:
    """Cut ``count`` examples into consecutive parts, [first, last) of each, along the bounds of batches.

    Every batch then has the same content, and every example the same row in it, as without parts.
    """
    batches = -(-count // batch_size)
    bounds = [min(part * batches // parts * batch_size, count) for part in range(parts + 1)]
    return list(itertools.pairwise(bounds))


class _ArraySource:
    """Images in memory as a source for the loader."""

    def __init__(self, images: np.ndarray) -> None:
        self._images = images
        self.image_shape = images.shape[1:]
        self.labels = np.full(len(images), -1, np.int32)

    def gather(self, indices: Any, out: Any = None) -> np.ndarray:
        """A copy of the images at ``indices``."""
        return self._images[np.asarray(indices)]


def build_run_net(run: Run) -> Net:
    """The network of a run, from its own configuration and image shape."""
    return build_network(run.config, run.image_shape, len(run.class_names))


def load_weights(run: Run, net: Net) -> tuple[tuple[Any, Any], int, list[str]]:
    """The (params, batch_stats) of a run's best checkpoint to evaluate with, as host arrays, its step, and remarks.

    Raises:
        UserError: no readable checkpoint, or one of another network.
    """
    checkpoint, remarks = run.best_checkpoint()
    config = run.config.optimizer
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    optimizer = make_optimizer(config, 1, shapes[0])

    def make_state() -> TrainState:
        params, batch_stats = net.init(jax.random.key(0))
        return initial_state(
            params,
            batch_stats,
            optimizer.init(params),
            ema=config.ema_decay > 0,
            average=keeps_average(config, batch_stats),
        )

    state = from_named_arrays(jax.eval_shape(make_state), checkpoint.arrays)
    return evaluation_weights(state, optimizer), checkpoint.step, remarks


def _stale(point: OperatingPoint, step: int, tta: Tta) -> list[str]:
    """What does not fit between the chosen threshold and the way it is about to be used."""
    if point.step is not None and point.step != step:
        return [
            f"the temperature and threshold were chosen for step {point.step}, but the best weights are now those of "
            f"step {step}: evaluate the run again"
        ]
    return _other_tta(point, tta)


def _other_tta(point: OperatingPoint, tta: Tta) -> list[str]:
    if point.criterion not in ("default", "fixed") and point.tta != tta:
        return [f"the threshold was chosen with --tta {point.tta} and is used with --tta {tta}"]
    return []


def _turn_batch(images: jax.Array, symmetry: int) -> jax.Array:
    """One of the eight symmetries of ``[B, H, W, C]``: bit 0 flips rows, bit 1 columns, bit 2 transposes."""
    if symmetry & 1:
        images = images[:, ::-1]
    if symmetry & 2:
        images = images[:, :, ::-1]
    return images.swapaxes(1, 2) if symmetry & 4 else images


_turn = jax.jit(_turn_batch, static_argnums=1)
