"""Weights and images made from numbers alone, so that two frameworks can be given the same ones.

`scripts/make_torchvision_reference.py` runs torchvision's nets on them and stores what they answer.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

REFERENCE = Path(__file__).with_name("torchvision_reference.npz")
OUTPUTS = 7
# net -> (height, width) of its images: small, oblong, and odd where strides and pools must round
SIZES = {
    "resnet18": (96, 96),
    "resnet34": (64, 96),
    "resnet50": (96, 96),
    "wide_resnet50_2": (50, 75),
    "densenet121": (96, 70),
    "efficientnet_b0": (75, 96),
}


def uniform(name: str, shape: Iterable[int]) -> np.ndarray:
    """Numbers in [-1, 1), float32, that depend on the name and shape only; numpy keeps raw words stable."""
    shape = tuple(shape)
    count = math.prod(shape)
    words = np.random.Philox(key=zlib.crc32(name.encode())).random_raw(count // 2 + 1).astype("<u8")
    halves = words.view("<u4")[:count] >> np.uint32(8)
    return halves.astype(np.float32).reshape(shape) * np.float32(2.0**-23) - np.float32(1)


def weight(name: str, shape: Iterable[int]) -> np.ndarray:
    """A tensor of a net in PyTorch's layout, float32: activations stay near one, statistics are not trivial."""
    shape = tuple(shape)
    numbers = uniform(name, shape)
    if len(shape) >= 2:
        numbers *= np.float32(math.sqrt(4 / math.prod(shape[1:])))
    elif name.endswith("running_var"):
        numbers = 1 + np.float32(0.5) * numbers
    elif name.endswith(("running_mean", "bias")):
        numbers = np.float32(0.3) * numbers
    elif name.endswith("weight"):
        numbers = 1 + np.float32(0.3) * numbers
    return numbers


def images(net: str) -> np.ndarray:
    """Two images as a net reads them, float32 [2, H, W, 3]."""
    return 2 * uniform(f"images of {net}", (2, *SIZES[net], 3))
