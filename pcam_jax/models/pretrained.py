"""Weights of other homes: PyTorch's names and layouts to and from those of our nets.

Our nets carry torchvision's paths, so that a name differs in its last word only, and an array in the order of
its axes. On top of that come timm's names for EfficientNet, the dotted ones of old DenseNet files, and
prefixes that training scripts put before all names (``module.``, ``backbone.``).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from pcam_jax.models.registry import Net, Tree
from pcam_jax.models.weight_files import Tensors, write_safetensors
from pcam_jax.runtime.errors import UserError

__all__ = ["Fitted", "fit_tensors", "head_path", "to_torchvision", "write_safetensors"]

_TO_TORCH = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
_UNUSED = "num_batches_tracked"


class Fitted(NamedTuple):
    """A net's weights after some were taken from elsewhere."""

    params: Tree
    """Nested dict of float32 arrays."""
    batch_stats: Tree
    """Likewise."""
    sentences: list[str]
    """What was loaded and what was not, for a person."""
    head_outputs: int | None
    """Outputs of the head that came with the weights; None where there was none, or none like ours."""


class _Slot(NamedTuple):
    """Where a tensor of the file belongs."""

    collection: str
    path: tuple[str, ...]
    shape: tuple[int, ...]


def to_torchvision(net: Net, params: Tree, batch_stats: Tree) -> Tensors:
    """Weights under the names and in the layouts of torchvision's net, ready for ``load_state_dict``.

    Convolutions become OIHW and dense layers [out, in]; each normalisation gets ``num_batches_tracked`` 0. Nets
    that torchvision does not have follow the same rules.

    Args:
        net: the net they belong to.
        params: nested dict of arrays.
        batch_stats: nested dict of arrays.

    Returns:
        Arrays by name, float32 (int64 for the counts).
    """
    tensors: Tensors = {}
    for path, leaf in [*_flat(params), *_flat(batch_stats)]:
        tensors[_torch_name(path)] = _to_torch_layout(np.asarray(leaf, np.float32))
        if path[-1] == "var":
            tensors[".".join((*path[:-1], _UNUSED))] = np.zeros((), np.int64)
    return tensors


def fit_tensors(
    net: Net, params: Tree, batch_stats: Tree, tensors: Mapping[str, np.ndarray], name: str
) -> Fitted:
    """Put tensors in PyTorch's names into a net.

    A prefix common to all names is removed. The head (the last layer) keeps its own weights where the file has
    none for it or the number of outputs differs. Everything else must fit exactly.

    Args:
        net: the net.
        params: its own weights, as drawn; nested dict of arrays.
        batch_stats: its own statistics.
        tensors: arrays of any float dtype by name.
        name: where they come from, for messages.

    Raises:
        UserError: a tensor is missing, left over, has another shape or is not finite; each is named (a whole
            module as ``layer4.*``).
    """
    slots = {
        _torch_name(path): _Slot(collection, path, _to_torch_layout(np.empty(leaf.shape, np.bool_)).shape)
        for collection, tree in (("params", params), ("batch_stats", batch_stats))
        for path, leaf in _flat(tree)
    }
    found, prefix, outside = _own_names(net, slots, tensors, name)
    head = head_path(net)
    head_slots = {key for key in slots if key.startswith(f"{head}.")}
    # an MLP or another kind of head may carry other names below the same module
    in_head = {key for key in found if key in head_slots or key.startswith(f"{head.split('.')[0]}.")} - (
        set(slots) - head_slots
    )
    head_fits = in_head == head_slots and all(found[key].shape == slots[key].shape for key in head_slots)
    _demand_fit(
        net,
        {key: slot.shape for key, slot in slots.items() if key not in head_slots},
        {key: array for key, array in found.items() if key not in in_head},
        name,
    )
    values: dict[str, Tree] = {"params": _copied(params), "batch_stats": _copied(batch_stats)}
    taken = [key for key in slots if key in found and (head_fits or key not in head_slots)]
    for key in taken:
        slot = slots[key]
        array = np.asarray(found[key]).astype(np.float32)
        if not np.isfinite(array).all():
            raise UserError(f"{name} holds values that are not finite numbers in {prefix}{key}.")
        _set(values[slot.collection], slot.path, _from_torch_layout(array))
    outputs = found[f"{head}.weight"].shape[0] if in_head == head_slots else None
    sentences = [_loaded(name, len(taken), len(slots), prefix, outside)]
    if not head_fits:
        sentences.append(_new_head(net, head, outputs, bool(in_head)))
    return Fitted(values["params"], values["batch_stats"], sentences, outputs)


def head_path(net: Net) -> str:
    """Dotted path of the net's last layer with parameters."""
    return [row.name for row in net.summary() if row.params][-1]


# ---------------------------------------------------------------------------------------------- names


def _torch_name(path: tuple[str, ...]) -> str:
    return ".".join((*path[:-1], _TO_TORCH.get(path[-1], path[-1])))


def _own_names(
    net: Net, slots: Mapping[str, _Slot], tensors: Mapping[str, np.ndarray], name: str
) -> tuple[Tensors, str, list[str]]:
    """The tensors by torchvision's names, the prefix removed from them, and the names outside it."""
    given = {key: array for key, array in tensors.items() if not key.endswith(_UNUSED)}
    prefixes: Counter[str] = Counter()
    for key in given:
        for start in (0, *(match.end() for match in re.finditer(r"\.", key))):
            if _translated(net, key[start:]) in slots:
                prefixes[key[:start]] += 1
    if not prefixes:
        first = f"its first tensor is {next(iter(given))}" if given else "it holds no tensors"
        raise UserError(f"{name} holds no weights of the model {net.name!r}: {first}.")
    prefix = prefixes.most_common(1)[0][0]
    found: Tensors = {}
    for key, array in given.items():
        if key.startswith(prefix):
            found[_translated(net, key[len(prefix) :])] = array
    return found, prefix, [key for key in given if not key.startswith(prefix)]


def _translated(net: Net, key: str) -> str:
    """A name of timm or of an old file as torchvision writes it today; other names as they are."""
    if net.name.startswith("densenet"):
        return re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", key)
    if net.name.startswith("efficientnet"):
        return _efficientnet_name(net, key)
    return key


_TIMM_OUTER = {"conv_stem": "0.0", "bn1": "0.1", "conv_head": "{last}.0", "bn2": "{last}.1"}
# the first stage does not expand, hence has one convolution less
_TIMM_FIRST = {
    "conv_dw": "0.0", "bn1": "0.1", "se.conv_reduce": "1.fc1", "se.conv_expand": "1.fc2", "conv_pw": "2.0",
    "bn2": "2.1",
}  # fmt: skip
_TIMM_LATER = {
    "conv_pw": "0.0", "bn1": "0.1", "conv_dw": "1.0", "bn2": "1.1", "se.conv_reduce": "2.fc1",
    "se.conv_expand": "2.fc2", "conv_pwl": "3.0", "bn3": "3.1",
}  # fmt: skip


def _efficientnet_name(net: Net, key: str) -> str:
    module, _, leaf = key.rpartition(".")
    if module == "classifier":
        return f"classifier.1.{leaf}"
    if module in _TIMM_OUTER:
        return f"features.{_TIMM_OUTER[module].format(last=8)}.{leaf}"
    match = re.fullmatch(r"blocks\.(\d+)\.(\d+)\.(.+)", module)
    if match is None:
        return key
    stage, layer = int(match[1]), match[2]
    inner = (_TIMM_LATER if stage else _TIMM_FIRST).get(match[3], match[3])
    return f"features.{stage + 1}.{layer}.block.{inner}.{leaf}"


# ---------------------------------------------------------------------------------------------- fit


def _demand_fit(
    net: Net, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, np.ndarray], name: str
) -> None:
    missing = set(wanted) - set(found)
    extra = set(found) - set(wanted)
    misshaped = [key for key in found if key in wanted and found[key].shape != wanted[key]]
    problems = []
    if missing:
        problems.append(f"missing {_named(missing, wanted)}")
    if extra:
        problems.append(f"not part of it {_named(extra, found)}")
    if misshaped:
        shapes = (f"{key} ({_shape(found[key].shape)} for {_shape(wanted[key])})" for key in misshaped)
        problems.append(f"of another shape {', '.join(shapes)}")
    if problems:
        raise UserError(
            f"{name} does not fit the model {net.name!r}: {'; '.join(problems)}. Check model.name and "
            "model.options."
        )


def _named(keys: set[str], all_keys: Iterable[str]) -> str:
    """The names in order; a module of which every tensor is concerned is named once, as ``layer4.*``."""
    universe = list(all_keys)

    def whole(module: str) -> bool:
        inside = [key in keys for key in universe if key.startswith(module)]
        return len(inside) > 1 and all(inside)

    named: dict[str, None] = {}
    for key in universe:
        if key in keys:
            modules = (key[: match.end()] for match in re.finditer(r"\.", key))
            named[next((f"{module}*" for module in modules if whole(module)), key)] = None
    return ", ".join(named)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"


def _loaded(name: str, taken: int, wanted: int, prefix: str, outside: list[str]) -> str:
    text = f"Loaded {taken} of {wanted} tensors from {name}"
    if prefix:
        text += f", whose names begin with {prefix!r}"
    if outside:
        shown = ", ".join(outside[:3]) + (", ..." if len(outside) > 3 else "")
        text += f"; left out {len(outside)} of other names ({shown})"
    return text + "."


def _new_head(net: Net, head: str, outputs: int | None, present: bool) -> str:
    if not present:
        return f"The head ({head}) starts anew: the file has none."
    if outputs in (None, net.outputs):
        return f"The head ({head}) starts anew: that of the file is made differently."
    text = f"The head ({head}) starts anew: outputs {net.outputs} here, {outputs} in the file"
    if outputs == 2 and net.outputs == 1:
        text += '; model.head = "softmax" would keep it'
    return text + "."


# ---------------------------------------------------------------------------------------------- arrays


def _to_torch_layout(array: np.ndarray) -> np.ndarray:
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1)
    return array.T if array.ndim == 2 else array


def _from_torch_layout(array: np.ndarray) -> np.ndarray:
    if array.ndim == 4:
        array = array.transpose(2, 3, 1, 0)
    elif array.ndim == 2:
        array = array.T
    return np.ascontiguousarray(array)


def _flat(tree: Tree, path: tuple[str, ...] = ()) -> Iterable[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, (*path, key))
        else:
            yield (*path, key), value


def _copied(tree: Tree) -> Tree:
    return {key: _copied(value) if isinstance(value, dict) else value for key, value in tree.items()}


def _set(tree: Tree, path: tuple[str, ...], value: np.ndarray) -> None:
    for key in path[:-1]:
        tree = tree[key]
    tree[path[-1]] = value
