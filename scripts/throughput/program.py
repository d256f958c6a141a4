"""A compiled program as a list of operations: what each computes, where it comes from, what it multiplies.

Read from the text that XLA prints of it (`jax.stages.Compiled.as_text`). A profile has times for the instructions of
computations; those inside a fusion have none of their own and are not listed.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

PRODUCTS, REDUCTIONS, ELEMENTWISE, CONVERSIONS, MOVES = (
    "matrix products",
    "reductions",
    "elementwise",
    "conversions of dtype",
    "copies and layouts",
)
_MOVING = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "copy", "copy-start", "copy-done", "transpose",
    "reshape", "slice", "pad", "concatenate", "broadcast", "reverse", "gather", "dynamic-slice",
    "dynamic-update-slice", "iota", "partition-id", "all-gather", "all-to-all", "collective-permute",
}  # fmt: skip
_REDUCING = {"reduce", "reduce-window", "select-and-scatter", "sort", "all-reduce"}
_CONTAINERS = {"while", "call", "conditional"}
_LIBRARY_PRODUCT = re.compile("gemm|matmul|conv(?!ert)|blas", re.IGNORECASE)

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_CALLED = re.compile(r"(?:calls|body|to_apply)=%?([\w.\-]+)")
_SHAPE = re.compile(r"\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Operation:
    """One instruction that the machine is given as a whole."""

    name: str
    result: str
    """Dtype and shape as XLA writes them, without the layout."""
    kind: str
    """One of the five above, or empty for a loop or call, whose parts are operations of their own."""
    source: str
    """Path of the traced function, such as ``jit(step)/transpose(jvp())/dot_general``, or empty."""
    flops: float
    """Two for each multiplication of the matrix products in it; zeros between pixels are counted too."""

    @property
    def phase(self) -> str:
        """Which part of a step it belongs to: forward, backward or neither."""
        if "transpose(jvp" in self.source:
            return "backward"
        return "forward" if "jvp(" in self.source else "other"


def read_program(text: str) -> dict[str, Operation]:
    """The operations of a compiled program by name.

    Args:
        text: as XLA prints it, after optimisation.
    """
    computations = _computations(text)
    shapes = {line.name: line.result for lines in computations.values() for line in lines}
    parts = {
        _called_by(line)
        for lines in computations.values()
        for line in lines
        if line.opcode not in _CONTAINERS
    }
    found = {}
    for name, lines in computations.items():
        for line in lines if name not in parts else ():
            inside = list(_inside(line, computations))
            found[line.name] = Operation(
                line.name,
                re.sub(r"\{.*?\}", "", line.result),
                _kind(line, inside),
                line.source or next((part.source for part in reversed(inside) if part.source), ""),
                sum(_flops(part, shapes) for part in (line, *inside)),
            )
    return found


@dataclasses.dataclass(frozen=True)
class _Line:
    name: str
    result: str
    opcode: str
    rest: str

    @property
    def source(self) -> str:
        named = re.search(r'op_name="([^"]*)"', self.rest)
        return named[1] if named else ""

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.split(")")[0])


def _computations(text: str) -> dict[str, list[_Line]]:
    computations: dict[str, list[_Line]] = {}
    lines: list[_Line] = []
    for row in text.splitlines():
        if begun := _COMPUTATION.match(row):
            lines = computations.setdefault(begun[1], [])
        elif read := _INSTRUCTION.match(row):
            lines.append(_Line(*read.groups()))
    return computations


def _called_by(line: _Line) -> str:
    called = _CALLED.search(line.rest)
    return called[1] if called else ""


def _inside(line: _Line, computations: dict[str, list[_Line]]) -> Iterator[_Line]:
    """What a fusion is made of; a reduction's own sum is none of it."""
    if line.opcode == "fusion":
        for part in computations.get(_called_by(line), []):
            yield part
            yield from _inside(part, computations)


def _kind(line: _Line, inside: list[_Line]) -> str:
    opcodes = {line.opcode, *(part.opcode for part in inside)} - {"fusion"}
    if line.opcode in _CONTAINERS:
        return ""
    target = re.search(r'custom_call_target="([^"]*)"', line.rest)
    if opcodes & {"dot", "convolution"} or (target and _LIBRARY_PRODUCT.search(target[1])):
        return PRODUCTS
    if opcodes & _REDUCING:
        return REDUCTIONS
    if opcodes <= _MOVING:
        return MOVES
    return CONVERSIONS if opcodes <= {*_MOVING, "convert"} else ELEMENTWISE


def _flops(line: _Line, shapes: dict[str, str]) -> float:
    if line.opcode not in ("dot", "convolution") or len(line.operands) < 2:
        return 0.0
    left, right = (_dims(shapes.get(name, "[]")) for name in line.operands[:2])
    results = math.prod(_dims(line.result))
    if line.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line.rest)
        axes = [int(axis) for axis in contracted[1].split(",") if axis] if contracted else []
        return 2.0 * results * math.prod(left[axis] for axis in axes)
    labels = re.search(r"dim_labels=\w+_(\w+)->", line.rest)
    return 2.0 * results * math.prod(right) / right[labels[1].index("o")] if labels else 0.0


def _dims(shape: str) -> list[int]:
    found = _SHAPE.search(shape)
    return [int(size) for size in found[1].split(",") if size] if found else []
