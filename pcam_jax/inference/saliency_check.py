"""Whether heat maps can be believed: do they point at the tumour, and does the answer hang on what is hot?

- Pointing game (Zhang et al. 2016, arXiv:1608.00507): the hottest pixel lies in the tumour, or not. It needs
  masks, which the synthetic sample has.
- Deletion (after Samek et al. 2017, arXiv:1509.06321): a tenth of the pixels is taken away, and the class's score
  falls. Removing the hottest must cost more than removing as much at random. Nothing can only be taken away:
  whatever stands in its place speaks to the net as well, and a net that blurring or white makes surer of tumour
  answers any removal by a rise. So the comparisons that count remove regions of equal shape: the hottest tenth
  moved to a random place of its image, and the hottest tenth of another image. Single pixels at random, the usual
  comparison, are given too, but they judge the filling as much as the heat: in white they are salt over the whole
  image, which many nets answer more than any loss of tissue; blurred they are hardly gone.
  What is removed is blurred beyond recognition (Fong & Vedaldi 2017, arXiv:1704.03296), or made white, empty glass.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import numpy as np
from scipy import ndimage

from pcam_jax.inference.saliency import Method, Saliency, share_inside
from pcam_jax.metrics.means import mean_with_interval
from pcam_jax.metrics.report import Metric
from pcam_jax.runtime.signals import Stop

REMOVED_SHARE = 0.1
Removal = Literal["blur", "white"]
REMOVALS: tuple[Removal, ...] = get_args(Removal)
BLUR_SHARE = 1 / 12
"""Standard deviation of the blur as a share of the image's shorter side: 8 pixels of 96, wider than a nucleus."""
_GLASS = 255


@dataclasses.dataclass(frozen=True)
class Deletion:
    """By how much the score of the class falls, in log-odds with two classes; means over images with intervals.

    Attributes:
        removal: what stands in the place of removed pixels.
        hottest: the hottest tenth removed.
        moved: the same region removed at a random place of the image.
        elsewhere: the hottest tenth of another image's map removed.
        scattered: a tenth of the single pixels removed at random.
        above_moved: ``hottest`` minus ``moved``, in pairs.
        above_elsewhere: ``hottest`` minus ``elsewhere``, in pairs.
        above_scattered: ``hottest`` minus ``scattered``, in pairs.
    """

    removal: Removal
    hottest: Metric
    moved: Metric
    elsewhere: Metric
    scattered: Metric
    above_moved: Metric
    above_elsewhere: Metric
    above_scattered: Metric


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
    removal: Removal = "blur",
    seed: int = 0,
    stop: Stop | None = None,
) -> Deletion:
    """Remove a tenth of each image in four ways, and compare.

    Args:
        saliency: of a predictor.
        method: whose maps.
        images: `[N, H, W, 3] uint8`, at least two.
        targets: `[N]` class whose score is watched.
        groups: names `[N]` for the intervals, or None.
        heat: `[N, H, W]`, where it is known already.
        removal: what stands in the place of removed pixels.
        seed: of the random places and pixels.
        stop: polled between batches.
    """
    without = emptied(images, removal)
    maps = saliency.heat(method, images, targets, stop) if heat is None else heat
    rng = np.random.default_rng(seed)
    before = saliency.scores(images, targets, stop)

    def fall(removed: np.ndarray) -> np.ndarray:
        after = saliency.scores(np.where(removed[..., None], without, images), targets, stop)
        return (before - after).astype(np.float64)

    hottest = hottest_pixels(maps, rng)
    falls = {
        "hottest": fall(hottest),
        "moved": fall(moved_at_random(hottest, rng)),
        "elsewhere": fall(np.roll(hottest, 1, axis=0)),
        "scattered": fall(hottest_pixels(np.zeros(maps.shape, np.float32), rng)),
    }
    means = {name: mean_with_interval(values, groups) for name, values in falls.items()}
    for name in ("moved", "elsewhere", "scattered"):
        means[f"above_{name}"] = mean_with_interval(falls["hottest"] - falls[name], groups)
    return Deletion(removal=removal, **means)


def moved_at_random(regions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each region of `[N, H, W] bool` at a random place; what leaves the image on one side enters on the other."""
    by = rng.integers(regions.shape[1:], size=(len(regions), 2))
    return np.stack([np.roll(region, tuple(by[place]), axis=(0, 1)) for place, region in enumerate(regions)])


def emptied(images: np.ndarray, removal: Removal) -> np.ndarray:
    """Images without what is in them, `[N, H, W, 3] uint8`: blurred beyond recognition, or white."""
    if removal == "white":
        return np.full_like(images, _GLASS)
    sigma = BLUR_SHARE * min(images.shape[1:3])
    blurred = [ndimage.gaussian_filter(image, (sigma, sigma, 0), output=np.float32) for image in images]
    return np.rint(blurred).astype(np.uint8)


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
