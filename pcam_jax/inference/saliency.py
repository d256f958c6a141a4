"""Heat maps: where in an image the evidence for a class lies, in the eyes of a net.

Two methods, each jitted in batches of one shape:

- HiResCAM (Draelos & Carin 2020, arXiv:2011.08891): an inner map times the gradient of the class's score with
  respect to it, summed over channels, negative parts dropped. Coarse, cheap, one pass forward and back. Grad-CAM
  (Selvaraju et al. 2017, arXiv:1610.02391) is the same with the gradient's mean over the map in its place, which
  is right only where the net itself averages the map: the nets that flatten it weigh each cell on its own. On
  the last map of a net with global average pooling and a linear head both are equal. The map is the last one of
  at least ten cells a side, since the last of all has 3x3 cells where a ResNet sees 96 pixels.
- Integrated gradients (Sundararajan et al. 2017, arXiv:1703.01365): the gradient, averaged on the straight way
  from a white image (empty glass) to the image, times the difference. Fine, one pass for each step of the way,
  and its sum is the difference of the two scores.

The score of a class is its log-odds with two classes, and its logit with more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from pcam_jax.inference.predictor import Predictor
from pcam_jax.models import shares
from pcam_jax.models.preprocess import standardize
from pcam_jax.models.registry import Net
from pcam_jax.runtime import accelerator, sharding
from pcam_jax.runtime.errors import UserError
from pcam_jax.runtime.signals import Stop

Method = Literal["grad_cam", "integrated_gradients"]
METHODS: tuple[Method, ...] = get_args(Method)
METHOD_LABELS = {"grad_cam": "Grad-CAM (HiResCAM)", "integrated_gradients": "Integrated gradients"}

BATCH_SIZE = 16
PATH_STEPS = 32
SMOOTHING = 1.5
"""Standard deviation in pixels by which single pixels' attributions are blurred into a heat map."""
GLASS = 1.0
"""Where the way of integrated gradients begins: white, which is no tissue."""
FEWEST_CELLS = 10
"""Cells along the shorter side of the map that HiResCAM looks at, where the net has such a map."""
_WIDER = 960  # by how many pixels an image is widened, in thought, to see how many cells more a map gets


class Saliency:
    """Heat maps of a predictor's net.

    Args:
        predictor: a trained run.
        batch_size: images in a jitted call, which the devices of this process share; rounded up to what they can.
        path_steps: steps of integrated gradients.
    """

    def __init__(
        self, predictor: Predictor, *, batch_size: int = BATCH_SIZE, path_steps: int = PATH_STEPS
    ) -> None:
        self._predictor = predictor
        self._mesh = sharding.make_local_mesh()
        self._batch_size = -(-batch_size // self._mesh.size) * self._mesh.size
        self._path_steps = path_steps
        self._row = map_row(predictor.net)
        self._upsample = upsampling_matrices(predictor.net, self._row)
        self._compiled: dict[str, Callable[..., jax.Array]] = {}

    def heat(
        self, method: Method, images: np.ndarray, targets: np.ndarray, stop: Stop | None = None
    ) -> np.ndarray:
        """Evidence for a class at each pixel, none below zero.

        Args:
            method: one of `METHODS`.
            images: `[N, H, W, 3] uint8`.
            targets: `[N]` class whose evidence is sought.
            stop: polled between batches.

        Returns:
            `[N, H, W] float32`; zero throughout where nothing speaks for the class.
        """
        if method == "grad_cam":
            return self.grad_cam(images, targets, stop)
        if method == "integrated_gradients":
            return pixel_heat(self.integrated_gradients(images, targets, stop))
        raise UserError(f"Unknown method {method!r}: choose {' or '.join(METHODS)}.")

    def grad_cam(self, images: np.ndarray, targets: np.ndarray, stop: Stop | None = None) -> np.ndarray:
        """HiResCAM, drawn out to the size of the images, `[N, H, W] float32`; arguments as `heat`.

        What speaks against the class is dropped after that, so that it cools the cells beside it.
        """
        maps = self._in_batches("grad_cam", self._grad_cam, images, targets, stop)
        rows, columns = self._upsample
        return np.maximum(np.einsum("Hh,nhw,Ww->nHW", rows, maps, columns), 0).astype(np.float32)

    def integrated_gradients(
        self, images: np.ndarray, targets: np.ndarray, stop: Stop | None = None
    ) -> np.ndarray:
        """What each pixel adds to the score above that of a white image, `[N, H, W] float32`, of both signs.

        The sum over an image is its score minus the white image's, up to the width of the steps.
        """
        net, scheme = self._predictor.net, self._predictor.normalization

        def add_step(
            weights: Any, batch: jax.Array, classes: jax.Array, at: jax.Array, so_far: jax.Array
        ) -> Any:
            pixels = batch.astype(jnp.float32) / 255
            way = pixels - GLASS

            def score(place: jax.Array) -> jax.Array:
                logits, _ = net.apply(weights[0], weights[1], standardize(place, scheme).astype(net.dtype))
                return jnp.sum(class_score(logits, classes))

            return so_far + jnp.sum(jax.grad(score)(GLASS + at * way) * way, axis=-1) / self._path_steps

        # a loop in Python: XLA's convolutions on CPU are many times slower inside a compiled loop
        def integrate(batch: jax.Array, classes: jax.Array) -> jax.Array:
            kinds: tuple[shares.Kind, ...] = ("whole", "share", "share", "whole", "share")
            step = self._jitted("integrated_gradients", add_step, kinds)
            total = jnp.zeros(batch.shape[:3])
            for number in range(self._path_steps):
                middle = np.float32((number + 0.5) / self._path_steps)
                total = step(self._predictor.weights, batch, classes, middle, total)
            return total

        return self._padded(integrate, images, targets, stop)

    def scores(self, images: np.ndarray, targets: np.ndarray, stop: Stop | None = None) -> np.ndarray:
        """Score of a class for each image, `[N] float32`; arguments as `heat`."""
        return self._in_batches("scores", self._score, images, targets, stop)

    def _grad_cam(self, weights: Any, batch: jax.Array, classes: jax.Array) -> jax.Array:
        net, scheme = self._predictor.net, self._predictor.normalization
        pixels = standardize(batch.astype(jnp.float32) / 255, scheme).astype(net.dtype)
        cells = net.summary()[self._row].output_shape

        def score(offset: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits, activation = net.tapped(weights[0], weights[1], pixels, self._row, offset)
            return jnp.sum(class_score(logits, classes)), activation

        gradient, activation = jax.grad(score, has_aux=True)(jnp.zeros((len(batch), *cells)))
        return jnp.sum(gradient * activation.astype(jnp.float32), axis=-1)

    def _score(self, weights: Any, batch: jax.Array, classes: jax.Array) -> jax.Array:
        net, scheme = self._predictor.net, self._predictor.normalization
        pixels = standardize(batch.astype(jnp.float32) / 255, scheme).astype(net.dtype)
        return class_score(net.apply(weights[0], weights[1], pixels)[0], classes)

    def _in_batches(
        self,
        name: str,
        function: Callable[..., jax.Array],
        images: np.ndarray,
        targets: np.ndarray,
        stop: Stop | None,
    ) -> np.ndarray:
        compiled = self._jitted(name, function, ("whole", "share", "share"))
        return self._padded(
            lambda batch, classes: compiled(self._predictor.weights, batch, classes), images, targets, stop
        )

    def _jitted(
        self, name: str, function: Callable[..., jax.Array], arguments: tuple[shares.Kind, ...]
    ) -> Callable[..., jax.Array]:
        if name not in self._compiled:
            apart = shares.apart(self._mesh, function, arguments, "share")
            self._compiled[name] = jax.jit(apart, compiler_options=accelerator.compiler_options())
        return self._compiled[name]

    def _padded(
        self,
        compute: Callable[[jax.Array, jax.Array], jax.Array],
        images: np.ndarray,
        targets: np.ndarray,
        stop: Stop | None,
    ) -> np.ndarray:
        """Apply ``compute`` to batches of one shape, the last filled up, and join the real rows."""
        classes = check_targets(images, targets, self._predictor)
        results = []
        for start in range(0, len(images), self._batch_size):
            if stop is not None:
                stop.check()
            batch, wanted = (part[start : start + self._batch_size] for part in (images, classes))
            missing = self._batch_size - len(batch)
            if missing:
                batch = np.concatenate([batch, np.zeros((missing, *batch.shape[1:]), np.uint8)])
                wanted = np.concatenate([wanted, np.zeros(missing, np.int32)])
            result = np.asarray(compute(jnp.asarray(batch), jnp.asarray(wanted)))
            results.append(result[: self._batch_size - missing])
        return np.concatenate(results)


def class_score(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Log-odds of the target with two classes, else its logit, `[B] float32`, of logits `[B, outputs]`."""
    if logits.shape[1] == 1:
        return jnp.where(targets == 1, logits[:, 0], -logits[:, 0])
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    return 2 * chosen - jnp.sum(logits, axis=1) if logits.shape[1] == 2 else chosen


def pixel_heat(attributions: np.ndarray) -> np.ndarray:
    """Turn attributions `[N, H, W]` of single pixels into heat: blurred a little, then what speaks against dropped.

    Single pixels' attributions are grainy; a neighbourhood's sum tells where the evidence lies.
    """
    blurred = ndimage.gaussian_filter(attributions, (0, SMOOTHING, SMOOTHING), mode="nearest")
    return np.maximum(blurred, 0).astype(np.float32)


def share_inside(heat: np.ndarray, side: int) -> np.ndarray:
    """Share of each map's heat that falls in the central ``side x side`` pixels, `[N] float64`; NaN without heat."""
    height, width = heat.shape[1:]
    top, left = (height - side) // 2, (width - side) // 2
    inside = heat[:, top : top + side, left : left + side].sum(axis=(1, 2), dtype=np.float64)
    total = heat.sum(axis=(1, 2), dtype=np.float64)
    return np.where(total > 0, inside / np.where(total > 0, total, 1.0), np.nan)


def central_side(image_shape: tuple[int, int, int]) -> int | None:
    """Side of the central square that decides the label of PCam's patches, or None for other sizes of image."""
    return 32 if image_shape[:2] == (96, 96) else None


def map_row(net: Net) -> int:
    """Number of the summary's row whose map HiResCAM looks at: the last of at least `FEWEST_CELLS` cells a side.

    Where no map is that large, the largest; the last among equals.
    """
    sizes = [0 if size is None else min(size) for size in net.map_sizes(*net.image_shape[:2])]
    wanted = min(FEWEST_CELLS, max(sizes))
    return max(row for row, size in enumerate(sizes) if size >= wanted)


def upsampling_matrices(net: Net, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Matrices `[H, h]` and `[W, w]` that draw a row's map out to the image, by linear interpolation.

    A cell is put where it looks from: the map's stride is read off how many cells more a larger image gets, and
    the map is centred. Stretching the map over the whole image, as is often done, would push the heat of nets
    without padding outwards, by up to seven pixels of 96 for the Keras nets.
    """
    image = net.image_shape[:2]
    cells = net.map_sizes(*image)[row]
    wider = net.map_sizes(image[0] + _WIDER, image[1] + _WIDER)[row]
    assert cells is not None
    assert wider is not None
    rows, columns = (
        _interpolation(size, count, round(_WIDER / (more - count)))
        for size, count, more in zip(image, cells, wider, strict=True)
    )
    return rows, columns


def check_targets(images: np.ndarray, targets: np.ndarray, predictor: Predictor) -> np.ndarray:
    """Check images and the classes to explain; returns targets `[N] int32`.

    Raises:
        UserError: no images, another shape or dtype than the net takes, or classes it does not know.
    """
    if images.dtype != np.uint8 or images.shape[1:] != predictor.image_shape or not len(images):
        raise UserError(
            f"Images to explain are {images.dtype} of shape {images.shape}: uint8 [N, "
            f"{', '.join(map(str, predictor.image_shape))}] is needed."
        )
    classes = np.asarray(targets)
    known = len(predictor.class_names)
    if classes.shape != (len(images),) or classes.min() < 0 or classes.max() >= known:
        raise UserError(f"Each of the {len(images)} images needs a class from 0 to {known - 1} to explain.")
    return classes.astype(np.int32)


def _interpolation(pixels: int, cells: int, stride: int) -> np.ndarray:
    """Weights `[pixels, cells]` of cells that lie ``stride`` pixels apart around the middle."""
    first = ((pixels - 1) - stride * (cells - 1)) / 2
    place = np.clip((np.arange(pixels) - first) / stride, 0, cells - 1)
    below = np.minimum(place.astype(int), max(cells - 2, 0))
    weights = np.zeros((pixels, cells))
    rows = np.arange(pixels)
    weights[rows, below] = 1 - (place - below)
    if cells > 1:
        weights[rows, below + 1] = place - below
    return weights
