"""Nets by name: `build_model` returns a `Net`, a set of pure functions over plain nested dicts of arrays."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from pcam_jax.models import (
    cnn3,
    densenet,
    efficientnet,
    idc_cnn,
    initializers,
    layers,
    melanoma_cnn,
    p4m,
    pcam_cnn,
    resnet,
)
from pcam_jax.runtime.errors import UserError

Tree = dict[str, Any]

_FACTORIES: dict[str, Callable[..., Any]] = {
    "pcam_model1": pcam_cnn.pcam_model1,
    "pcam_model2": pcam_cnn.pcam_model2,
    "pcam_model3": pcam_cnn.pcam_model3,
    "pcam_model4": pcam_cnn.pcam_model4,
    "pcam_cnn3": cnn3.pcam_cnn3,
    "densenet121": densenet.densenet121,
    "efficientnet_b0": efficientnet.efficientnet_b0,
    "idc_cnn": idc_cnn.idc_cnn,
    "melanoma_v1": melanoma_cnn.melanoma_v1,
    "melanoma_v2": melanoma_cnn.melanoma_v2,
    "melanoma_v3": melanoma_cnn.melanoma_v3,
    "p4_densenet": p4m.p4_densenet,
    "p4m_cnn": p4m.p4m_cnn,
    "p4m_densenet": p4m.p4m_densenet,
    "p4m_resnet": p4m.p4m_resnet,
    "resnet18": resnet.resnet18,
    "resnet34": resnet.resnet34,
    "resnet50": resnet.resnet50,
    "resnet_small": resnet.resnet_small,
    "wide_resnet50_2": resnet.wide_resnet50_2,
}

_GIVEN_BY_BUILD_MODEL = ("image_shape", "outputs", "dtype")


class LayerRow(NamedTuple):
    """One line of a net's summary: its path, output shape without the batch axis, parameters."""

    name: str
    output_shape: tuple[int, ...]
    params: int


def model_names() -> tuple[str, ...]:
    """The names `build_model` knows, in alphabetical order."""
    return tuple(sorted(_FACTORIES))


def model_options(name: str) -> dict[str, Any]:
    """The options of a net and their defaults.

    Raises:
        UserError: unknown net.
    """
    parameters = inspect.signature(_factory(name)).parameters.values()
    return {p.name: p.default for p in parameters if p.name not in _GIVEN_BY_BUILD_MODEL}


def build_model(
    name: str,
    *,
    image_shape: tuple[int, int, int],
    outputs: int,
    dtype: DTypeLike = jnp.float32,
    **options: Any,
) -> Net:
    """Describe a net without computing anything; `Net.init` makes its parameters.

    Args:
        name: one of `model_names()`.
        image_shape: (H, W, C) of the images.
        outputs: number of logits: 1 for a sigmoid head, the number of classes for a softmax head.
        dtype: dtype of the arithmetic; parameters, statistics and logits are float32 whatever it is.
        **options: see `model_options(name)`.

    Raises:
        UserError: unknown net or option, or images too small for the net.
    """
    factory = _factory(name)
    known = model_options(name)
    for option in options:
        if option not in known:
            allowed = f"it takes {', '.join(known)}" if known else "it takes none"
            raise UserError(
                f"The model {name!r} has no option {option!r}{_nearest(option, known)}; {allowed}."
            )

    try:
        model = nnx.eval_shape(
            lambda: factory(image_shape=image_shape, outputs=outputs, dtype=dtype, **options)
        )
        net = Net(name, image_shape, outputs, jnp.dtype(dtype), *_split(model))
        net.summary()
    except UserError as error:
        height, width = image_shape[:2]
        raise UserError(f"The model {name!r} cannot take {height}x{width} images. {error}") from None
    return net


@dataclass(frozen=True, eq=False)
class Net:
    """A net as pure functions of (params, batch_stats, x).

    params and batch_stats are nested dicts of float32 arrays with string keys.

    x is `[B, H, W, C]`, already scaled (see `preprocess.normalize`). All methods can be jitted.
    """

    name: str
    image_shape: tuple[int, int, int]
    outputs: int
    dtype: jnp.dtype
    _graphdef: Any = field(repr=False)
    _params: Any = field(repr=False)
    _batch_stats: Any = field(repr=False)

    def init(self, key: jax.Array) -> tuple[Tree, Tree]:
        """Draw (params, batch_stats) from a key, in one compiled call; batch_stats may be {}."""
        variables = {_dotted(path): variable for path, variable in nnx.to_flat_state(self._params)}
        wanted = {
            path: (variable.get_metadata("init"), variable.shape) for path, variable in variables.items()
        }

        def draw(key: jax.Array) -> tuple[Tree, Tree]:
            batch_stats = {
                _dotted(path): jnp.full(variable.shape, path[-1] == "var", jnp.float32)
                for path, variable in nnx.to_flat_state(self._batch_stats)
            }
            return _nested(initializers.draw(key, wanted)), _nested(batch_stats)

        return jax.jit(draw)(key)

    def apply(
        self,
        params: Tree,
        batch_stats: Tree,
        x: jax.Array,
        *,
        train: bool = False,
        train_body: bool = True,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Tree]:
        """Logits `[B, outputs] float32` and the batch statistics afterwards (unchanged unless `train`).

        Args:
            params: from `init`, a checkpoint or an optimizer.
            batch_stats: likewise.
            x: `[B, H, W, C]` scaled images.
            train: use the batch's own statistics and dropout.
            train_body: without it only the head is in training: the body, up to the last spatial map, runs in
                evaluation mode and no gradient reaches it.
            key: dropout key, needed by nets with dropout when `train`.
        """
        model = nnx.merge(self._graphdef, params, batch_stats)
        features = model.feature_map(x, train=train and train_body, key=key)
        if not train_body:
            features = jax.lax.stop_gradient(features)
        logits = model.classify(features, train=train, key=key)
        new_stats = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)) if train else batch_stats
        return logits.astype(jnp.float32), new_stats

    def batch_statistics(
        self, params: Tree, batch_stats: Tree, x: jax.Array, *, key: jax.Array | None = None
    ) -> Tree:
        """Mean and variance of what each normalisation meets in this batch alone: a tree like batch_stats.

        Every normalisation works by the batch, as in training; dropout draws from `key`.
        """
        model = nnx.merge(self._graphdef, params, batch_stats)
        for _, module in nnx.iter_modules(model):
            if isinstance(module, layers.BatchNorm):
                module.momentum = 0.0  # nothing of the old statistics is kept
        model.classify(model.feature_map(x, train=True, key=key), train=True, key=key)
        return nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    def features(self, params: Tree, batch_stats: Tree, x: jax.Array) -> jax.Array:
        """The last spatial map in evaluation mode, `[B, h, w, C]`."""
        return nnx.merge(self._graphdef, params, batch_stats).feature_map(x, train=False, key=None)

    def classify(self, params: Tree, batch_stats: Tree, features: jax.Array) -> jax.Array:
        """Logits `[B, outputs] float32` of a map from `features`: what `apply` returns in evaluation mode."""
        model = nnx.merge(self._graphdef, params, batch_stats)
        return model.classify(features, train=False, key=None).astype(jnp.float32)

    def tapped(
        self, params: Tree, batch_stats: Tree, x: jax.Array, row: int, offset: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Evaluate with ``offset`` added to the output of one row of `summary`.

        The gradient of the logits with respect to an offset of zeros is that with respect to the row's map.

        Args:
            params: as `apply`.
            batch_stats: as `apply`.
            x: `[B, H, W, C]` scaled images.
            row: number of the row.
            offset: of the shape of the row's output, batch axis included.

        Returns:
            Logits `[B, outputs] float32`, and the row's output before the offset.
        """
        model = nnx.merge(self._graphdef, params, batch_stats)
        with layers.tapping(row, offset) as taken:
            features = model.feature_map(x, train=False, key=None)
            logits = model.classify(features, train=False, key=None)
        return logits.astype(jnp.float32), taken[0]

    def map_sizes(self, height: int, width: int) -> list[tuple[int, int] | None]:
        """Height and width of each row's map up to the last spatial one, for images of another size.

        Nothing is computed. A row whose output is no map has None.
        """

        def trace(params: Any, batch_stats: Any, x: jax.Array) -> jax.Array:
            return nnx.merge(self._graphdef, params, batch_stats).feature_map(x, train=False, key=None)

        image = jax.ShapeDtypeStruct((1, height, width, self.image_shape[2]), jnp.float32)
        with layers.recording() as calls:
            jax.eval_shape(trace, self._params, self._batch_stats, image)
        return [(shape[1], shape[2]) if len(shape) == 4 else None for _, shape in calls]

    def summary(self) -> list[LayerRow]:
        """One row per layer or block in the order they run, by shape inference alone."""
        return self._trace()[0]

    def depths(self) -> Tree:
        """How far each parameter lies from the head: a tree like params of ints.

        0 is the head (what `classify` runs); 1 is the last part of the body, and so on down to the stem. A part
        is a top-level module, such as a stage of a residual net, with the normalisation that follows it.
        """
        rows, body_rows = self._trace()
        with_kernels = {
            _part(_dotted(path))
            for path, variable in nnx.to_flat_state(self._params)
            if len(variable.shape) >= 2
        }
        place, places = 0, dict[str, int]()
        for part in dict.fromkeys(_part(row.name) for row in rows[:body_rows] if row.params):
            place += part in with_kernels or not places
            places[part] = place
        distance = {part: place + 1 - own for part, own in places.items()}
        return jax.tree_util.tree_map_with_path(
            lambda path, _: distance.get(_part(jax.tree_util.keystr(path, simple=True, separator=".")), 0),
            nnx.to_pure_dict(self._params),
        )

    def _trace(self) -> tuple[list[LayerRow], int]:
        """The summary, and how many of its rows belong to the body."""
        rows: list[LayerRow] = []
        body_calls = 0

        def trace(params: Any, batch_stats: Any, x: jax.Array) -> jax.Array:
            model = nnx.merge(self._graphdef, params, batch_stats)
            names = {id(module): _dotted(path) for path, module in nnx.iter_modules(model)}
            nonlocal body_calls
            with layers.recording() as calls:
                features = model.feature_map(x, train=False, key=None)
                body_calls = len(calls)
                logits = model.classify(features, train=False, key=None)
            for module, shape in calls:
                rows.append(LayerRow(names[id(module)], shape[1:], _count(nnx.state(module, nnx.Param))))
            return logits

        image = jax.ShapeDtypeStruct((1, *self.image_shape), jnp.float32)
        jax.eval_shape(trace, self._params, self._batch_stats, image)
        return rows, body_calls

    @property
    def param_count(self) -> int:
        """Number of trainable parameters."""
        return _count(self._params)

    @property
    def batch_stat_count(self) -> int:
        """Number of running statistics, which Keras counts as non-trainable parameters."""
        return _count(self._batch_stats)


def _split(model: Any) -> tuple[Any, Any, Any]:
    """Graph definition, parameters and batch statistics of a module."""
    graphdef, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)  # type: ignore[misc]
    return graphdef, params, batch_stats


def _part(name: str) -> str:
    """The top-level module of a dotted name, one level further down inside a container named "features"."""
    pieces = name.split(".")
    return ".".join(pieces[: 2 if pieces[0] == "features" else 1])


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


def _nested(flat: dict[str, jax.Array]) -> Tree:
    return nnx.traversals.unflatten_mapping({tuple(path.split(".")): value for path, value in flat.items()})


def _count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _factory(name: str) -> Callable[..., Any]:
    if name not in _FACTORIES:
        hint = _nearest(name, _FACTORIES)
        raise UserError(f"There is no model {name!r}{hint}; known models: {', '.join(model_names())}.")
    return _FACTORIES[name]


def _nearest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=3, cutoff=0.4)
    return f" (did you mean {' or '.join(close)}?)" if close else ""
