"""The model that is served: one run or the mean of several, behind queues, as answers about pictures."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from pcam_jax.inference.averaging import load_predictors
from pcam_jax.inference.predictor import ExportedPredictor
from pcam_jax.inference.saliency import Saliency, central_side
from pcam_jax.metrics.recalibration import apply_temperature
from pcam_jax.run.folder import CONFIG, open_run
from pcam_jax.runtime.errors import UserError
from pcam_jax.web.batching import Batcher, batch_sizes
from pcam_jax.web.limits import MEBIBYTE
from pcam_jax.web.pictures import Intake, Picture

QUEUE_PATCHES = 4096
"""Patches that may wait, unless they take more than `QUEUE_BYTES`."""
QUEUE_BYTES = 256 * MEBIBYTE
HEAT_BATCH = 16
_HEAT_QUEUE = 256


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a request asks for besides probabilities."""

    uncertainty: bool = False
    """Also look at each patch in all its symmetries."""
    heat: bool = False
    """Also draw heat maps of patches."""


@dataclasses.dataclass(frozen=True)
class _Scores:
    """Mean probabilities ``[n, K]`` of each class, and those of class 1 (or the best) by view, ``[n, views]``."""

    probs: np.ndarray
    views: np.ndarray


class ServedModel:
    """Answers about pictures.

    Args:
        paths: runs (or exported models); several give their mean.
        tta: ``none`` or ``d4``: how the probability itself is averaged.
        threshold: of the decision; by default the run's own, and .5 for the mean of several.
        largest_batch: patches the device takes at once.
        observe: told of each batch: size, real rows, seconds.

    Raises:
        UserError: one cannot be loaded, they do not fit together, or the threshold is no probability.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        *,
        tta: Any = "none",
        threshold: float | None = None,
        largest_batch: int = 64,
        observe: Callable[[int, int, float], None] | None = None,
    ) -> None:
        if threshold is not None and not 0 <= threshold <= 1:
            raise UserError(f"--threshold is {threshold:g}: a probability lies between 0 and 1.")
        self.predictors = load_predictors(paths, tta=tta)
        first = self.predictors[0]
        self.names = [Path(path).resolve().name for path in paths]
        self.tta = tta
        self.class_names = first.class_names
        self.image_shape = first.image_shape
        self.central_side = central_side(first.image_shape)
        self.point = first.operating_point
        self.remarks = list(dict.fromkeys(remark for one in self.predictors for remark in one.remarks))
        if threshold is not None:
            self.threshold, self.criterion = threshold, "given to the service"
        elif len(self.predictors) > 1:
            self.threshold, self.criterion = 0.5, "default of the mean of several runs"
        else:
            self.threshold, self.criterion = self.point.threshold, self.point.criterion
        # what a threshold means was counted for one run's own, and says nothing about a mean
        own = len(self.predictors) == 1 and self.threshold == self.point.threshold
        self.meaning = self.point.meaning if own else ""
        self.intake, self.cards, self.facts = self._records([Path(path) for path in paths])
        row_bytes = int(np.prod(self.image_shape))
        self._patches = Batcher(
            self._dispatch,
            batch_sizes(largest_batch, jax.local_device_count()),
            min(QUEUE_PATCHES, QUEUE_BYTES // row_bytes),
            observe,
        )
        self._heat: Batcher | None = None
        if not any(isinstance(one, ExportedPredictor) for one in self.predictors):
            self._saliency = {
                size: [Saliency(one, batch_size=size) for one in self.predictors] for size in (1, HEAT_BATCH)
            }
            self._heat = Batcher(self._draw_heat, tuple(self._saliency), _HEAT_QUEUE, name="heat maps")

    @property
    def waiting(self) -> int:
        """Patches in the queue."""
        return self._patches.waiting

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Batch sizes that are compiled."""
        return self._patches.sizes

    @property
    def capacity(self) -> int:
        """Patches that may wait, and the most of one request."""
        return self._patches.capacity

    @property
    def draws_heat(self) -> bool:
        """Whether heat maps can be asked for; exported models have none."""
        return self._heat is not None

    def warm_up(self, stop: Callable[[], bool]) -> bool:
        """Compile everything that requests need; False where ``stop`` said so on the way."""
        image = np.zeros(self.image_shape, np.uint8)
        if not self._patches.warm_up(image, stop=stop):
            return False
        return self._heat is None or self._heat.warm_up(image, np.asarray(1, np.int32), stop=stop)

    def close(self, timeout: float) -> None:
        """Answer what was taken and end the threads."""
        self._patches.close(timeout)
        if self._heat is not None:
            self._heat.close(timeout)

    def check_room(self) -> None:
        """Raise `Busy` where the queue is full."""
        self._patches.check_room()

    async def answer(self, pictures: Sequence[Picture], wanted: Wanted) -> list[dict[str, Any]]:
        """What there is to say of each picture, as `api.Result` has it.

        Raises:
            Busy: the queue is full.
        """
        averaged = self.predictors[0].symmetries()
        square = self.image_shape[0] == self.image_shape[1]
        views = tuple(range(8 if square else 4)) if wanted.uncertainty else averaged
        rows = [turned(picture.patches, views if picture.grid is None else averaged) for picture in pictures]
        logits = await asyncio.wrap_future(self._patches.submit(np.concatenate(rows)))
        answers, first = [], 0
        for picture, own in zip(pictures, rows, strict=True):
            seen = views if picture.grid is None else averaged
            scores = self._scores(logits[first : first + len(own)], seen, averaged)
            first += len(own)
            answers.append(self._answer(picture, scores, wanted))
        if wanted.heat and self._heat is not None:
            await self._add_heat(pictures, answers)
        return answers

    def _dispatch(self, images: np.ndarray) -> _Stacked:
        return _Stacked([one.dispatch(images) for one in self.predictors])

    def _draw_heat(self, images: np.ndarray, targets: np.ndarray) -> np.ndarray:
        maps = [one.grad_cam(images, targets) for one in self._saliency[len(images)]]
        return np.mean([_to_unit(heat) for heat in maps], axis=0)

    async def _add_heat(self, pictures: Sequence[Picture], answers: list[dict[str, Any]]) -> None:
        assert self._heat is not None
        which = [number for number, picture in enumerate(pictures) if picture.grid is None]
        if not which:
            return
        # with two classes the evidence for class 1 is what a person looks for, whatever was decided
        targets = [1 if len(self.class_names) == 2 else answers[number]["class"] for number in which]
        images = np.concatenate([pictures[number].patches for number in which])
        heat = await asyncio.wrap_future(self._heat.submit(images, np.array(targets, np.int32)))
        for number, target, one in zip(which, targets, heat, strict=True):
            answers[number]["heat_map"] = {"class": self.class_names[target], "png": data_url(_grey_png(one))}

    def _scores(self, logits: np.ndarray, views: tuple[int, ...], averaged: tuple[int, ...]) -> _Scores:
        """Probabilities of logits ``[n * views, models, outputs]``, in which an image's views stand together."""
        by_view = logits.reshape(-1, len(views), *logits.shape[1:])
        columns = []
        for number, predictor in enumerate(self.predictors):
            temperature = predictor.operating_point.temperature
            probs = apply_temperature(
                by_view[:, :, number].reshape(-1, by_view.shape[-1]).astype(np.float64), temperature
            )
            if probs.ndim == 1:
                probs = np.stack([1 - probs, probs], axis=1)
            columns.append(probs.reshape(len(by_view), len(views), -1))
        everything = np.stack(columns, axis=2)  # [n, views, models, classes]
        wanted = [views.index(view) for view in averaged]
        probs = everything[:, wanted].mean(axis=(1, 2))
        foremost = np.ones(len(probs), int) if probs.shape[1] == 2 else probs.argmax(axis=1)
        spread = everything.reshape(len(probs), -1, probs.shape[1])
        return _Scores(probs, spread[np.arange(len(probs)), :, foremost])

    def _answer(self, picture: Picture, scores: _Scores, wanted: Wanted) -> dict[str, Any]:
        binary = len(self.class_names) == 2
        # of a picture in tiles the one that counts is the most suspicious, or with several classes the surest
        top = int(scores.probs[:, 1].argmax() if binary else scores.probs.max(axis=1).argmax())
        probs = scores.probs[top]
        called = int(probs[1] >= self.threshold) if binary else int(probs.argmax())
        foremost = 1 if binary else called
        answer: dict[str, Any] = {
            "name": picture.name,
            "kind": "patch" if picture.grid is None else "tiled",
            "width": picture.width,
            "height": picture.height,
            "probability": _rounded(probs[foremost]),
            "probabilities": {
                name: _rounded(value) for name, value in zip(self.class_names, probs, strict=True)
            },
            "class": called,
            "decision": self.class_names[called],
            "uncertainty": None,
            "heat_map": None,
            "map": None,
            "preview": data_url(picture.preview) if picture.preview else None,
        }
        if picture.grid is not None:
            answer["map"] = self._map(picture, scores.probs[:, foremost])
        elif scores.views.shape[1] > 1:
            spread = scores.views[0]
            answer["uncertainty"] = {
                "views": len(spread),
                "standard_deviation": _rounded(spread.std()),
                "lowest": _rounded(spread.min()),
                "highest": _rounded(spread.max()),
                "agrees": bool(np.all(spread >= self.threshold) or np.all(spread < self.threshold))
                if binary
                else None,
            }
        return answer

    def _map(self, picture: Picture, probs: np.ndarray) -> dict[str, Any]:
        assert picture.grid is not None
        rows, columns = picture.grid.shape
        return {
            "tops": list(picture.grid.tops),
            "lefts": list(picture.grid.lefts),
            "tile_height": self.image_shape[0],
            "tile_width": self.image_shape[1],
            "tiles": len(probs),
            "at_or_above_threshold": int(np.sum(probs >= self.threshold)),
            "mean": _rounded(probs.mean()),
            "probabilities": np.round(probs.astype(float), 4).reshape(rows, columns).tolist(),
        }

    def _records(self, paths: Sequence[Path]) -> tuple[Intake, list[str], list[dict[str, Any]]]:
        """How pictures are taken in, and the cards and facts of the runs; exported models bring fewer."""
        intake, cards, facts = Intake(self.image_shape), [], []
        for path, predictor in zip(paths, self.predictors, strict=True):
            fact: dict[str, Any] = {"name": path.resolve().name, "step": predictor.step}
            if (path / CONFIG).is_file():
                run = open_run(path)
                fact |= {"network": run.config.model.name, "parameters": run.environment["params"]}
                card = path / "MODEL_CARD.md"
                cards.append(card.read_text(encoding="utf-8") if card.is_file() else "")
            facts.append(fact)
            if "size" in predictor.prepared:
                fit = predictor.prepared.get("fit", "stretch")
                intake = Intake(self.image_shape, resize=True, fit=fit)
        return intake, [card for card in cards if card], facts


class _Stacked:
    """Logits of several models under way, ``[B, models, outputs]`` once they are asked for."""

    def __init__(self, parts: list[Any]) -> None:
        self._parts = parts

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.stack([np.asarray(part, np.float32) for part in self._parts], axis=1)


def turned(patches: np.ndarray, symmetries: Sequence[int]) -> np.ndarray:
    """Each patch in each symmetry, ``[n * symmetries, H, W, 3]``, numbered as `Predictor.symmetries` does."""
    if tuple(symmetries) == (0,):
        return patches
    views = []
    for number in symmetries:
        view = patches
        if number & 1:
            view = view[:, ::-1]
        if number & 2:
            view = view[:, :, ::-1]
        views.append(view.swapaxes(1, 2) if number & 4 else view)
    return np.stack(views, axis=1).reshape(-1, *patches.shape[1:])


def data_url(png: bytes) -> str:
    """A PNG as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _to_unit(heat: np.ndarray) -> np.ndarray:
    """Each map divided by its highest value; one without heat stays zero."""
    top = heat.max(axis=(1, 2), keepdims=True)
    return np.where(top > 0, heat / np.where(top > 0, top, 1), 0).astype(np.float32)


def _grey_png(heat: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.round(np.clip(heat, 0, 1) * 255).astype(np.uint8)).save(file, "png")
    return file.getvalue()


def _rounded(value: Any) -> float:
    return float(f"{float(value):.6g}")
