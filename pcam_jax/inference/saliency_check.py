"""Whether heat maps can be believed: do they point at the tumour, and does the answer hang on what is hot?

- Pointing game (Zhang et al. 2016, arXiv:1608.00507): the hottest pixel lies in the tumour, or not. It needs
  masks, which the synthetic sample has.
- Deletion (after Samek et al. 2017, arXiv:1509.06321): a tenth of the pixels is made empty glass (white), and the
  class's score falls. Removing the hottest must cost more than removing as many at random. A random tenth is
  scattered, which harms a net in its own way, so the hottest places of another image, equal in shape, are a
  second comparison.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from pcam_jax.inference.saliency import Method, Saliency, share_inside
from pcam_jax.metrics.means import mean_with_interval
from pcam_jax.metrics.report import Metric
from pcam_jax.runtime.signals import Stop

REMOVED_SHARE = 0.1
_GLASS = 255


@dataclasses.dataclass(frozen=True)
class Deletion:
    """By how much the score of the class falls, in log-odds with two classes; means over images with intervals.

    Attributes:
        hottest: the hottest tenth removed.
        random: a random tenth removed.
        elsewhere: the hottest tenth of another image's map removed.
        above_random: ``hottest`` minus ``random``, in pairs.
        above_elsewhere: ``hottest`` minus ``elsewhere``, in pairs.
    """

    hottest: Metric
    random: Metric
    elsewhere: Metric
    above_random: Metric
    above_elsewhere: Metric


@dataclasses.dataclass(frozen=True)
class Pointing:
    """How often a pixel lies in the tumour.

    Attributes:
        hit_rate: of the hottest pixel; an image without heat is a miss.
        chance: of a random pixel.
        heat_on_target: share of the heat that falls on the tumour.
    """

    hit_rate: Metric
    chance: Metric
    heat_on_target: Metric


def check_deletion(
    saliency: Saliency,
    method: Method,
    images: np.ndarray,
    targets: np.ndarray,
    groups: np.ndarray | None = None,
    heat: np.ndarray | None = None,
    seed: int = 0,
    stop: Stop | None = None,
) -> Deletion:
    """Remove a tenth of each image in three ways, and compare.

    Args:
        saliency: of a predictor.
        method: whose maps.
        images: `[N, H, W, 3] uint8`, at least two.
        targets: `[N]` class whose score is watched.
        groups: names `[N]` for the intervals, or None.
        heat: `[N, H, W]`, where it is known already.
        seed: of the random pixels.
        stop: polled between batches.
    """
    maps = saliency.heat(method, images, targets, stop) if heat is None else heat
    rng = np.random.default_rng(seed)
    before = saliency.scores(images, targets, stop)

    def fall(removed: np.ndarray) -> np.ndarray:
        emptied = images.copy()
        emptied[removed] = _GLASS
        return (before - saliency.scores(emptied, targets, stop)).astype(np.float64)

    hottest = hottest_pixels(maps, rng)
    falls = {
        "hottest": fall(hottest),
        "random": fall(hottest_pixels(np.zeros(maps.shape, np.float32), rng)),
        "elsewhere": fall(np.roll(hottest, 1, axis=0)),
    }
    return Deletion(
        **{name: mean_with_interval(values, groups) for name, values in falls.items()},
        above_random=mean_with_interval(falls["hottest"] - falls["random"], groups),
        above_elsewhere=mean_with_interval(falls["hottest"] - falls["elsewhere"], groups),
    )


def check_pointing(heat: np.ndarray, masks: np.ndarray, groups: np.ndarray | None = None) -> Pointing:
    """Play the pointing game.

    Args:
        heat: `[N, H, W]`.
        masks: `[N, H, W] bool`, where the tumour is.
        groups: names `[N]` for the intervals, or None.
    """
    flat, inside = heat.reshape(len(heat), -1), masks.reshape(len(masks), -1)
    hits = inside[np.arange(len(flat)), flat.argmax(axis=1)] & (flat.max(axis=1) > 0)
    total = flat.sum(axis=1, dtype=np.float64)
    on_target = (flat * inside).sum(axis=1, dtype=np.float64)
    return Pointing(
        hit_rate=mean_with_interval(hits.astype(float), groups),
        chance=mean_with_interval(inside.mean(axis=1), groups),
        heat_on_target=mean_with_interval(
            np.where(total > 0, on_target / np.where(total > 0, total, 1), np.nan), groups
        ),
    )


def check_centre(heat: np.ndarray, side: int, groups: np.ndarray | None = None) -> Metric:
    """Mean share of the heat in the central square; maps without heat are left out."""
    return mean_with_interval(share_inside(heat, side), groups)


def hottest_pixels(heat: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The hottest tenth of each map, `[N, H, W] bool`; level pixels are drawn at random."""
    flat = heat.reshape(len(heat), -1)
    shuffled = rng.permuted(np.broadcast_to(np.arange(flat.shape[1]), flat.shape), axis=1)
    order = np.take_along_axis(
        shuffled, np.argsort(-np.take_along_axis(flat, shuffled, 1), axis=1, kind="stable"), 1
    )
    chosen = np.zeros(flat.shape, bool)
    np.put_along_axis(chosen, order[:, : round(REMOVED_SHARE * flat.shape[1])], True, axis=1)
    return chosen.reshape(heat.shape)
