"""Which examples are worth looking at, and what a net looked at in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pandas as pd

from pcam_jax.data.named import open_named_store
from pcam_jax.data.sample import sample_masks
from pcam_jax.data.store import Store
from pcam_jax.inference.predictor import Predictor
from pcam_jax.inference.saliency import METHODS, Method, Saliency, central_side, share_inside
from pcam_jax.inference.saliency_check import (
    REMOVALS,
    Deletion,
    Pointing,
    Removal,
    check_centre,
    check_deletion,
    check_pointing,
)
from pcam_jax.metrics.calibration import nll_terms
from pcam_jax.metrics.inputs import check_predictions
from pcam_jax.metrics.report import Metric
from pcam_jax.metrics.threshold import predicted_classes
from pcam_jax.run.folder import Run
from pcam_jax.run.predictions import Evaluation
from pcam_jax.runtime.errors import UserError
from pcam_jax.runtime.signals import Stop

SAMPLE_SIZE = 256
"""Examples over which shares of heat are averaged."""


@dataclasses.dataclass(frozen=True)
class Category:
    """A kind of example worth a look: its name in files, a title, and its members, the foremost first."""

    name: str
    title: str
    members: np.ndarray


@dataclasses.dataclass(frozen=True)
class Explained:
    """One example of a category.

    Attributes:
        category: name of it.
        rank: from 1.
        id: of the example.
        group: slide or patient, "" where unknown.
        label: its class.
        predicted: what it was called.
        prob: of class 1, or with more classes of the predicted one.
        loss: negative log-likelihood of its label, nats.
        target: class whose evidence the heat shows.
        image: `[H, W, 3] uint8`.
        heat: `[H, W] float32` by method.
        central_share: share of the heat in the central square by method; NaN without a square or without heat.
    """

    category: str
    rank: int
    id: str
    group: str
    label: int
    predicted: int
    prob: float
    loss: float
    target: int
    image: np.ndarray
    heat: dict[Method, np.ndarray]
    central_share: dict[Method, float]


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What a net looked at, in examples and on average.

    Attributes:
        evaluation: whose examples these are.
        methods: which maps.
        categories: kinds of examples, with their members as positions in the evaluation.
        examples: of all categories, in order.
        central_side: side of the central square, or None.
        sample_size: number of examples of class 1 behind the figures below.
        central_share: mean share of the heat in the central square by method.
        central_chance: what heat spread evenly would give.
        deletion: by method, where it was checked; one for each filling.
        pointing: by method, where it was checked and the store has masks.
    """

    evaluation: Evaluation
    methods: tuple[Method, ...]
    categories: list[Category]
    examples: list[Explained]
    central_side: int | None
    sample_size: int
    central_share: dict[Method, Metric]
    central_chance: float
    deletion: dict[Method, tuple[Deletion, ...]]
    pointing: dict[Method, Pointing]


def explain_run(
    run: Run,
    evaluation: Evaluation,
    *,
    methods: Sequence[Method] = METHODS,
    count: int = 8,
    sample_size: int = SAMPLE_SIZE,
    check: bool = False,
    removals: Sequence[Removal] = REMOVALS,
    stop: Stop | None = None,
) -> Explanation:
    """Heat maps of the examples worth looking at, and figures over a sample of class 1.

    Args:
        run: from `open_run`.
        evaluation: of the run, with its present weights.
        methods: which maps.
        count: most examples of a category.
        sample_size: examples of class 1 (with more classes: of any) for the figures; 0 leaves them out.
        check: also delete the hottest pixels and play the pointing game on the sample.
        removals: what stands in the place of deleted pixels, one after the other.
        stop: polled between batches.

    Raises:
        UserError: the run has gone on since the evaluation, or its store has moved.
    """
    store = open_named_store(evaluation.store)
    predictor = Predictor.load(run.path)
    if predictor.step != evaluation.step:
        raise UserError(
            f"{run.path} was evaluated at step {evaluation.step}, but its best weights are now those of step "
            f"{predictor.step}: evaluate it again."
        )
    saliency = Saliency(predictor)
    side = central_side(predictor.image_shape)
    categories = choose_categories(evaluation, run.class_names, count)
    examples = explain_categories(categories, evaluation, store, saliency, methods, side, stop)
    binary = evaluation.probs.ndim == 1
    sample = sample_of_class(evaluation, 1 if binary else None, sample_size)
    central: dict[Method, Metric] = {}
    deletion: dict[Method, tuple[Deletion, ...]] = {}
    pointing: dict[Method, Pointing] = {}
    if len(sample) > 1 and (side or check):
        positions = positions_of(store, evaluation.ids[sample])
        images = store.gather(positions)
        targets = evaluation.labels[sample].astype(np.int64)
        groups = evaluation.groups[sample]
        masks = sample_masks(store, positions) if check and has_masks(store) else None
        for method in methods:
            heat = saliency.heat(method, images, targets, stop)
            if side:
                central[method] = check_centre(heat, side, groups)
            if check:
                deletion[method] = tuple(
                    check_deletion(
                        saliency,
                        method,
                        images,
                        targets,
                        groups=groups,
                        heat=heat,
                        removal=removal,
                        stop=stop,
                    )
                    for removal in removals
                )
            if masks is not None:
                pointing[method] = check_pointing(heat, masks, groups)
    height, width, _ = predictor.image_shape
    return Explanation(
        evaluation=evaluation,
        methods=tuple(methods),
        categories=categories,
        examples=examples,
        central_side=side,
        sample_size=len(sample),
        central_share=central,
        central_chance=side * side / (height * width) if side else float("nan"),
        deletion=deletion,
        pointing=pointing,
    )


def choose_categories(evaluation: Evaluation, class_names: Sequence[str], count: int) -> list[Category]:
    """The examples with the largest losses, the most certain and the most uncertain ones.

    With two classes missed positives come first, since they are what a screening must not do.

    Args:
        evaluation: of the run.
        class_names: by label.
        count: most members of a category.
    """
    labels, probs = evaluation.labels, evaluation.probs
    losses = example_losses(evaluation)
    called = predicted_classes(probs, evaluation.report.decision_threshold)
    wrong = called != labels

    def foremost(mask: np.ndarray, merit: np.ndarray) -> np.ndarray:
        members = np.flatnonzero(mask)
        return members[np.argsort(-merit[members], kind="stable")][:count]

    if probs.ndim == 1:
        negative, positive = class_names
        distance = np.abs(probs - evaluation.report.decision_threshold)
        return [
            Category(
                "missed", f"Missed: {positive}, called {negative}", foremost(wrong & (labels == 1), losses)
            ),
            Category(
                "false_alarms",
                f"False alarms: {negative}, called {positive}",
                foremost(wrong & (labels == 0), losses),
            ),
            Category(
                "uncertain",
                "Most uncertain: nearest to the threshold",
                foremost(np.full(len(labels), True), -distance),
            ),
            Category(
                "certain_positive",
                f"Most certain {positive}, rightly",
                foremost(~wrong & (labels == 1), probs),
            ),
            Category(
                "certain_negative",
                f"Most certain {negative}, rightly",
                foremost(~wrong & (labels == 0), -probs),
            ),
        ]
    ordered = np.sort(probs, axis=1)
    return [
        Category("mistaken", "Mistaken: largest losses", foremost(wrong, losses)),
        Category(
            "uncertain",
            "Most uncertain: two classes nearly level",
            foremost(~wrong, ordered[:, -2] - ordered[:, -1]),
        ),
        Category("certain", "Most certain, rightly", foremost(~wrong, ordered[:, -1])),
    ]


def example_losses(evaluation: Evaluation) -> np.ndarray:
    """Negative log-likelihood of each example's label, `[N]`, nats."""
    return nll_terms(check_predictions(evaluation.labels, evaluation.probs))


def explain_categories(
    categories: Sequence[Category],
    evaluation: Evaluation,
    store: Store,
    saliency: Saliency,
    methods: Sequence[Method],
    central_side: int | None,
    stop: Stop | None = None,
) -> list[Explained]:
    """Heat maps of every member of every category.

    Heat shows the evidence for class 1 with two classes, and for the predicted class with more.

    Args:
        categories: from `choose_categories`.
        evaluation: that they were chosen from.
        store: where its images are.
        saliency: of the run's predictor.
        methods: which maps.
        central_side: side of the central square, or None.
        stop: polled between batches.
    """
    chosen = np.unique(np.concatenate([category.members for category in categories]).astype(np.int64))
    if not len(chosen):
        return []
    images = store.gather(positions_of(store, evaluation.ids[chosen]))
    called = predicted_classes(evaluation.probs, evaluation.report.decision_threshold)
    binary = evaluation.probs.ndim == 1
    targets = np.ones(len(chosen), np.int64) if binary else called[chosen]
    heat = {method: saliency.heat(method, images, targets, stop) for method in methods}
    shares = {
        method: share_inside(maps, central_side) if central_side else np.full(len(maps), np.nan)
        for method, maps in heat.items()
    }
    losses = example_losses(evaluation)
    probs = evaluation.probs if binary else evaluation.probs.max(axis=1)
    place = {int(index): row for row, index in enumerate(chosen)}
    return [
        Explained(
            category=category.name,
            rank=rank,
            id=str(evaluation.ids[index]),
            group=str(evaluation.groups[index]),
            label=int(evaluation.labels[index]),
            predicted=int(called[index]),
            prob=float(probs[index]),
            loss=float(losses[index]),
            target=int(targets[place[index]]),
            image=images[place[index]],
            heat={method: maps[place[index]] for method, maps in heat.items()},
            central_share={method: float(values[place[index]]) for method, values in shares.items()},
        )
        for category in categories
        for rank, index in enumerate(map(int, category.members), start=1)
    ]


def sample_of_class(
    evaluation: Evaluation, label: int | None, count: int = SAMPLE_SIZE, seed: int = 0
) -> np.ndarray:
    """Up to ``count`` random examples of a class (None: of all), as positions in the evaluation, in order."""
    members = np.arange(len(evaluation.labels))
    if label is not None:
        members = np.flatnonzero(evaluation.labels == label)
    if len(members) > count:
        members = np.sort(np.random.default_rng(seed).choice(members, count, replace=False))
    return members


def has_masks(store: Store) -> bool:
    """Whether a store knows where the tumour is, as the synthetic sample does."""
    return bool(store.manifest.source.get("masks"))


def positions_of(store: Store, ids: np.ndarray) -> np.ndarray:
    """Where examples lie in a store, `[n] int64`.

    Raises:
        UserError: the store lacks some.
    """
    found = pd.Index(store.ids).get_indexer(pd.Index(ids))
    if (found < 0).any():
        raise UserError(
            f"The store {store.path} lacks {int((found < 0).sum())} of the evaluated examples "
            f"({ids[found < 0][0]} first): evaluate the run on it again."
        )
    return found.astype(np.int64)
