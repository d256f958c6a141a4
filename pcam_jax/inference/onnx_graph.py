"""From a JAX function of images to an ONNX graph, for the operations that our networks consist of.

The function is traced once (`jax.make_jaxpr`) with a symbolic batch, and each of its primitives becomes an operation.
jax2onnx would do the same and more, but no recent release installs beside our checkpoint library, and it brings
packages that nothing here needs; with networks in their plain forms there are some thirty primitives to know.

Whatever depends on weights alone is computed here and kept as a constant: the kernels of equivariant networks in all
orientations, the scales and shifts of batch normalisation. Maps ``[B, H, W, C]`` are carried as ``[B, C, H, W]``,
which ONNX's convolutions and pools take, from the first convolution to whatever needs the old order.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from pcam_jax.runtime.errors import UserError, require

OPSET = 18
_IR_VERSION = 10  # read by onnxruntime from 1.18 on
_TO_NCHW, _TO_NHWC = (0, 3, 1, 2), (0, 2, 3, 1)
_END = np.iinfo(np.int64).max
_ELEMENTWISE = {
    "abs": "Abs", "add": "Add", "add_any": "Add", "div": "Div", "eq": "Equal", "exp": "Exp", "ge": "GreaterOrEqual",
    "gt": "Greater", "le": "LessOrEqual", "log": "Log", "logistic": "Sigmoid", "lt": "Less", "max": "Max",
    "min": "Min", "mul": "Mul", "neg": "Neg", "pow": "Pow", "sqrt": "Sqrt", "sub": "Sub", "tanh": "Tanh",
}  # fmt: skip
_FOLDED: dict[str, Callable[..., Any]] = {
    "add": np.add, "div": np.divide, "mul": np.multiply, "sub": np.subtract, "rsqrt": lambda x: 1 / np.sqrt(x),
}  # fmt: skip
_ANY_WIDTH = ("rsqrt", "integer_pow", "square", "convert_element_type", "copy", "select_n")
_INLINED = {"jit": "jaxpr", "pjit": "jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}


@dataclasses.dataclass(frozen=True)
class _Value:
    """A tensor of the graph, or a constant of the function.

    Attributes:
        name: in the graph; empty for constants.
        shape: as JAX has it.
        constant: the array, where it does not depend on the images.
        channels_first: the tensor holds ``[B, C, H, W]`` of JAX's ``[B, H, W, C]``.
        narrow: some sides are one that JAX has stretched; operations element by element stretch them by themselves.
    """

    name: str
    shape: tuple[Any, ...]
    constant: np.ndarray | None = None
    channels_first: bool = False
    narrow: bool = False


def to_onnx(
    function: Callable[[jax.Array], Sequence[jax.Array]],
    image_shape: tuple[int, int, int],
    outputs: Sequence[str],
    name: str,
) -> tuple[bytes, int]:
    """Convert a function of ``[batch, H, W, 3] uint8`` images.

    Args:
        function: returns a tuple of arrays whose first axis is the batch.
        image_shape: (H, W, 3).
        outputs: names of the results; the images are called ``images``.
        name: of the graph.

    Returns:
        The ONNX file's bytes, and the version of the operation set.

    Raises:
        UserError: the package onnx is missing, or the function holds an operation that is not known here.
    """
    onnx = require("onnx", extra="onnx")
    from jax import export

    (batch,) = export.symbolic_shape("batch")
    closed = jax.make_jaxpr(function)(jax.ShapeDtypeStruct((batch, *image_shape), jnp.uint8))
    graph = _Graph(onnx)
    images = _Value("images", (batch, *image_shape))
    results = graph.inline(closed.jaxpr, closed.consts, [images])
    infos = []
    for output, value, aval in zip(outputs, results, closed.out_avals, strict=True):
        _demand(not value.narrow, "a stretched result")
        graph.node("Identity", [graph.as_jax(value)], output=output)
        infos.append(
            onnx.helper.make_tensor_value_info(
                output, _element_type(onnx, aval.dtype), _named_shape(aval.shape)
            )
        )
    made = onnx.helper.make_graph(
        graph.nodes,
        name,
        [onnx.helper.make_tensor_value_info("images", onnx.TensorProto.UINT8, ["batch", *image_shape])],
        infos,
        graph.initializers,
    )
    model = onnx.helper.make_model(
        made,
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        ir_version=_IR_VERSION,
        producer_name="pcam_jax",
    )
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString(), OPSET


class _Graph:
    """Nodes and constants as they come together."""

    def __init__(self, onnx: Any) -> None:
        self._onnx = onnx
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._turned: dict[str, str] = {}

    # ------------------------------------------------------------------ building blocks

    def node(self, kind: str, inputs: Sequence[str], output: str = "", **attributes: Any) -> str:
        """Add an operation; returns the name of its only result."""
        name = output or f"v{len(self.nodes)}"
        self.nodes.append(self._onnx.helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def constant(self, array: np.ndarray) -> str:
        """The name of a constant, stored once however often it is used."""
        array = np.ascontiguousarray(array).reshape(array.shape)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = f"c{len(self.initializers)}"
            self.initializers.append(self._onnx.numpy_helper.from_array(array, self._constants[key]))
        return self._constants[key]

    def as_jax(self, value: _Value) -> str:
        """The tensor in JAX's order of axes."""
        if value.constant is not None:
            return self.constant(value.constant)
        return self._permuted(value.name, _TO_NHWC) if value.channels_first else value.name

    def channels_first(self, value: _Value) -> str:
        """The tensor with the channels before the pixels; a constant of four axes likewise."""
        if value.constant is not None:
            turned = value.constant.transpose(_TO_NCHW) if value.constant.ndim == 4 else value.constant
            return self.constant(turned)
        if value.channels_first or len(value.shape) != 4:
            return value.name
        return self._permuted(value.name, _TO_NCHW)

    def _permuted(self, name: str, order: tuple[int, ...]) -> str:
        key = f"{name} {order}"
        if key not in self._turned:
            self._turned[key] = self.node("Transpose", [name], perm=order)
        return self._turned[key]

    # ------------------------------------------------------------------ walking

    def inline(self, jaxpr: Any, consts: Sequence[Any], arguments: Sequence[_Value]) -> list[_Value]:
        """Convert a jaxpr's equations; returns its results."""
        known: dict[Any, _Value] = dict(zip(jaxpr.invars, arguments, strict=True))
        for variable, const in zip(jaxpr.constvars, consts, strict=True):
            known[variable] = _known(np.asarray(const))

        def read(atom: Any) -> _Value:
            return _known(np.asarray(atom.val)) if isinstance(atom, core.Literal) else known[atom]

        for equation in jaxpr.eqns:
            inputs = [read(atom) for atom in equation.invars]
            for variable, value in zip(equation.outvars, self._convert(equation, inputs), strict=True):
                known[variable] = value
        return [read(atom) for atom in jaxpr.outvars]

    def _convert(self, equation: Any, inputs: list[_Value]) -> list[_Value]:
        kind, params = equation.primitive.name, equation.params
        shape = tuple(equation.outvars[0].aval.shape)
        if kind == "broadcast_in_dim" and inputs[0].constant is not None and not _is_symbolic(equation):
            return [_known(_stretched(inputs[0].constant, params["broadcast_dimensions"], shape))]
        if all(value.constant is not None for value in inputs) and not _is_symbolic(equation):
            if kind in _FOLDED:  # at once, where JAX would compile a program for every shape
                arrays = [value.constant for value in inputs if value.constant is not None]
                return [_known(np.asarray(_FOLDED[kind](*arrays), equation.outvars[0].aval.dtype))]
            found = equation.primitive.bind(*(jnp.asarray(value.constant) for value in inputs), **params)
            several = equation.primitive.multiple_results
            return [_known(np.asarray(array)) for array in (found if several else [found])]
        if kind in _INLINED:
            inner = params[_INLINED[kind]]
            jaxpr, consts = (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, ())
            return self.inline(jaxpr, consts, inputs)
        if kind in _ELEMENTWISE:
            return [self._elementwise(_ELEMENTWISE[kind], inputs, shape)]
        if kind not in _ANY_WIDTH:
            _demand(not any(value.narrow for value in inputs), f"a stretched array in {kind!r}")
        handler = getattr(self, f"_{kind}", None)
        if handler is None:
            raise UserError(
                f"The network holds the operation {kind!r}, which is not converted to ONNX: export it as stablehlo."
            )
        return [handler(inputs, shape, params, equation)]

    # ------------------------------------------------------------------ element by element

    def _elementwise(
        self, kind: str, inputs: list[_Value], shape: tuple[Any, ...], **attributes: Any
    ) -> _Value:
        """In the order of axes that the maps have; constants follow."""
        first = any(value.channels_first for value in inputs)
        narrow = all(value.narrow or value.constant is not None for value in inputs)
        if kind == "Max" and (zero := inputs[1].constant) is not None and zero.size == 1 and not zero.any():
            kind, inputs = "Relu", inputs[:1]
        names = [self.channels_first(value) if first else self.as_jax(value) for value in inputs]
        return _Value(self.node(kind, names, **attributes), shape, channels_first=first, narrow=narrow)

    def _rsqrt(self, inputs: list[_Value], shape: tuple[Any, ...], params: Any, equation: Any) -> _Value:
        root = self._elementwise("Sqrt", inputs, shape)
        return self._elementwise("Reciprocal", [root], shape)

    def _integer_pow(
        self, inputs: list[_Value], shape: tuple[Any, ...], params: Any, equation: Any
    ) -> _Value:
        power = _known(np.asarray(params["y"], equation.invars[0].aval.dtype))
        return self._elementwise("Pow", [*inputs, power], shape)

    def _square(self, inputs: list[_Value], shape: tuple[Any, ...], params: Any, equation: Any) -> _Value:
        return self._elementwise("Mul", [*inputs, *inputs], shape)

    def _convert_element_type(
        self, inputs: list[_Value], shape: tuple[Any, ...], params: Any, equation: Any
    ) -> _Value:
        return self._elementwise("Cast", inputs, shape, to=_element_type(self._onnx, params["new_dtype"]))

    def _copy(self, inputs: list[_Value], shape: tuple[Any, ...], params: Any, equation: Any) -> _Value:
        return inputs[0]

    _stop_gradient = _copy
    _optimization_barrier = _copy

    def _select_n(self, inputs: list[_Value], shape: tuple[Any, ...], params: Any, equation: Any) -> _Value:
        which, if_false, if_true = inputs
        return self._elementwise("Where", [which, if_true, if_false], shape)

    # ------------------------------------------------------------------ maps

    def _conv_general_dilated(
        self, inputs: list[_Value], shape: tuple[Any, ...], params: Any, equation: Any
    ) -> _Value:
        numbers = params["dimension_numbers"]
        expected = ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
        _demand(
            (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec) == expected
            and set(params["lhs_dilation"]) == {1}
            and params["batch_group_count"] == 1
            and inputs[1].constant is not None,
            "a convolution of an unusual kind",
        )
        kernel = inputs[1].constant
        assert kernel is not None
        name = self.node(
            "Conv",
            [self.channels_first(inputs[0]), self.constant(kernel.transpose(3, 2, 0, 1))],
            kernel_shape=kernel.shape[:2],
            strides=params["window_strides"],
            dilations=params["rhs_dilation"],
            group=params["feature_group_count"],
            pads=_onnx_pads(params["padding"]),
        )
        return _Value(name, shape, channels_first=True)

    def _reduce_window_max(
        self, inputs: list[_Value], shape: tuple[Any, ...], params: Any, equation: Any
    ) -> _Value:
        return self._pool("MaxPool", inputs[0], shape, params)

    def _reduce_window_sum(
        self, inputs: list[_Value], shape: tuple[Any, ...], params: Any, equation: Any
    ) -> _Value:
        mean = self._pool("AveragePool", inputs[0], shape, params, count_include_pad=1)
        area = _known(np.asarray(math.prod(params["window_dimensions"]), np.float32))
        return self._elementwise("Mul", [mean, area], shape)

    def _pool(
        self, kind: str, value: _Value, shape: tuple[Any, ...], params: Any, **attributes: Any
    ) -> _Value:
        window, strides, padding = params["window_dimensions"], params["window_strides"], params["padding"]
        _demand(
            len(window) == 4
            and (window[0], window[3], strides[0], strides[3]) == (1, 1, 1, 1)
            and not any((*padding[0], *padding[3]))
            and {*params["base_dilation"], *params["window_dilation"]} == {1},
            "a pool of an unusual kind",
        )
        name = self.node(
            kind,
            [self.channels_first(value)],
            kernel_shape=window[1:3],
            strides=strides[1:3],
            pads=_onnx_pads(padding[1:3]),
            **attributes,
        )
        return _Value(name, shape, channels_first=True)

    def _concatenate(
        self, inputs: list[_Value], shape: tuple[Any, ...], params: Any, equation: Any
    ) -> _Value:
        return self._along("Concat", inputs, shape, params["dimension"])

    def _along(self, kind: str, inputs: list[_Value], shape: tuple[Any, ...], axis: int) -> _Value:
        first = any(value.channels_first for value in inputs)
        names = [self.channels_first(value) if first else self.as_jax(value) for value in inputs]
        return _Value(self.node(kind, names, axis=_axis(axis, first)), shape, channels_first=first)

    def _slice(self, inputs: list[_Value], shape: tuple[Any, ...], params: Any, equation: Any) -> _Value:
        (value,) = inputs
        strides = params["strides"] or (1,) * len(shape)
        wanted = [
            (start, limit, stride, _axis(axis, value.channels_first))
            for axis, (start, limit, stride, length) in enumerate(
                zip(params["start_indices"], params["limit_indices"], strides, value.shape, strict=True)
            )
            if not (_is(start, 0) and _is(stride, 1) and _is(limit, length))
        ]
        if not wanted:
            return value
        _demand(all(isinstance(number, int) for row in wanted for number in row), "a slice of the batch")
        columns = [self.constant(np.array(column, np.int64)) for column in zip(*wanted, strict=True)]
        starts, limits, steps, axes = columns
        name = self.node("Slice", [value.name, starts, limits, axes, steps])
        return _Value(name, shape, channels_first=value.channels_first)

    def _pad(self, inputs: list[_Value], shape: tuple[Any, ...], params: Any, equation: Any) -> _Value:
        value, filling = inputs
        ends = params["padding_config"]
        _demand(
            all(inner == 0 for _, _, inner in ends) and filling.constant is not None, "padding between pixels"
        )
        order = _TO_NCHW if value.channels_first else range(len(ends))
        pads = [ends[axis][0] for axis in order] + [ends[axis][1] for axis in order]
        assert filling.constant is not None
        inputs_named = [value.name, self.constant(np.array(pads, np.int64)), self.constant(filling.constant)]
        return _Value(self.node("Pad", inputs_named), shape, channels_first=value.channels_first)

    # ------------------------------------------------------------------ sums and products

    def _reduce_sum(self, inputs: list[_Value], shape: tuple[Any, ...], params: Any, equation: Any) -> _Value:
        return self._reduced("ReduceSum", inputs[0], shape, params["axes"])

    def _reduce_max(self, inputs: list[_Value], shape: tuple[Any, ...], params: Any, equation: Any) -> _Value:
        return self._reduced("ReduceMax", inputs[0], shape, params["axes"])

    def _reduced(self, kind: str, value: _Value, shape: tuple[Any, ...], axes: Sequence[int]) -> _Value:
        # what is left keeps its order only if the channels, or nothing but them, stand last
        first = value.channels_first and set(axes) in ({1, 2}, {1, 2, 3}, {3, 1, 2, 0})
        name = value.name if first else self.as_jax(value)
        places = self.constant(np.array(sorted(_axis(axis, first) for axis in axes), np.int64))
        return _Value(self.node(kind, [name, places], keepdims=0), shape)

    def _argmax(self, inputs: list[_Value], shape: tuple[Any, ...], params: Any, equation: Any) -> _Value:
        (axis,) = params["axes"]
        found = self.node("ArgMax", [self.as_jax(inputs[0])], axis=axis, keepdims=0)
        return _Value(self.node("Cast", [found], to=_element_type(self._onnx, params["index_dtype"])), shape)

    def _dot_general(
        self, inputs: list[_Value], shape: tuple[Any, ...], params: Any, equation: Any
    ) -> _Value:
        contracted, batched = params["dimension_numbers"]
        _demand(
            (tuple(map(tuple, contracted)), tuple(map(tuple, batched))) == (((1,), (0,)), ((), ())),
            "a product of an unusual kind",
        )
        return _Value(self.node("MatMul", [self.as_jax(value) for value in inputs]), shape)

    # ------------------------------------------------------------------ shapes

    def _reshape(self, inputs: list[_Value], shape: tuple[Any, ...], params: Any, equation: Any) -> _Value:
        _demand(sum(not isinstance(length, int) for length in shape) <= 1, "a shape with two unknown sides")
        sizes = [length if isinstance(length, int) else -1 for length in shape]
        places = self.constant(np.array(sizes, np.int64))
        return _Value(self.node("Reshape", [self.as_jax(inputs[0]), places]), shape)

    _squeeze = _reshape
    _expand_dims = _reshape

    def _broadcast_in_dim(
        self, inputs: list[_Value], shape: tuple[Any, ...], params: Any, equation: Any
    ) -> _Value:
        (value, *_) = inputs
        wider = [1] * len(shape)
        for axis, length in zip(params["broadcast_dimensions"], value.shape, strict=True):
            wider[axis] = length
        value = self._reshape([value], tuple(wider), params, equation)
        # a side stays one until an operation after it stretches it by itself
        narrow = any(not _is(had, wanted) for had, wanted in zip(wider, shape, strict=True))
        return dataclasses.replace(value, shape=shape, narrow=narrow)

    def _transpose(self, inputs: list[_Value], shape: tuple[Any, ...], params: Any, equation: Any) -> _Value:
        return _Value(self._permuted(self.as_jax(inputs[0]), tuple(params["permutation"])), shape)


def _known(array: np.ndarray) -> _Value:
    return _Value("", array.shape, constant=array)


def _stretched(array: np.ndarray, axes: Sequence[int], shape: tuple[int, ...]) -> np.ndarray:
    """What broadcast_in_dim makes of a constant."""
    wider = [1] * len(shape)
    for axis, length in zip(axes, array.shape, strict=True):
        wider[axis] = length
    return np.broadcast_to(array.reshape(wider), shape)


def _is_symbolic(equation: Any) -> bool:
    """Whether an equation of constants has a result whose size depends on the batch."""
    return any(not isinstance(length, int) for variable in equation.outvars for length in variable.aval.shape)


def _is(number: Any, other: Any) -> bool:
    return bool(number == other)


def _axis(axis: int, channels_first: bool) -> int:
    return _TO_NCHW.index(axis) if channels_first else axis


def _onnx_pads(padding: Sequence[tuple[int, int]]) -> list[int]:
    return [before for before, _ in padding] + [after for _, after in padding]


def _named_shape(shape: Sequence[Any]) -> list[Any]:
    return [length if isinstance(length, int) else "batch" for length in shape]


def _element_type(onnx: Any, dtype: Any) -> int:
    return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def _demand(condition: bool, what: str) -> None:
    if not condition:
        raise UserError(f"The network holds {what}, which is not converted to ONNX: export it as stablehlo.")
