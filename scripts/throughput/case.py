"""What is measured: one net, one task, one batch size, one precision, in one framework."""

from __future__ import annotations

import dataclasses
import json
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """One cell of the benchmark for one system."""

    system: str
    """``ours``, its variants ``ours-malloc`` and ``ours-plain``, ``torch-eager``, ``torch-compile``,
    ``keras-tensorflow`` or ``keras-jax``."""
    task: str
    """``train`` (uint8 batch in, forward, backward, Adam) or ``predict`` (uint8 batch in, probabilities out)."""
    model: str
    batch: int
    precision: str
    side: int = 96

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> Case:
        return Case(**json.loads(text))


@dataclasses.dataclass(frozen=True)
class Contender:
    """A framework ready to run a case."""

    run: Callable[[int], None]
    """Do so many steps and wait for the last."""
    matmul: Callable[[], Callable[[], None]]
    """Prepare one 2048-cubed product in the case's precision; the result runs it and waits."""
    facts: dict[str, Any]
    """Versions, device, and whatever else belongs in the record."""
    program: Callable[[], str] | None = None
    """The compiled step as XLA prints it, where XLA compiled it."""


class NotAvailableError(Exception):
    """The framework is not installed or cannot run the case; the message says why."""


def batches(case: Case, count: int = 4) -> list[tuple[np.ndarray, np.ndarray]]:
    """A few batches of noise, ``uint8 [B, side, side, 3]`` and ``int32 [B]``, the same for every system."""
    rng = np.random.default_rng(0)
    shape = (case.batch, case.side, case.side, 3)
    return [
        (rng.integers(0, 256, shape, np.uint8), rng.integers(0, 2, case.batch).astype(np.int32))
        for _ in range(count)
    ]


MATMUL_SIDE = 2048


def measure_peak(run: Callable[[], None]) -> float:
    """GFLOP/s of the product, the best of several short trials."""
    run()
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return 2 * MATMUL_SIDE**3 / best / 1e9


def peak_memory_mib() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
