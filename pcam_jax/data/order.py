"""The order in which a run reads its training examples: a pure function of (seed, step).

The stream is the concatenation of one permutation per epoch; step k takes positions [k*B, (k+1)*B) of it.
Nothing is dropped, padded or remembered, so a resume needs the step number alone, and the number of processes
or devices that share a batch changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from pcam_jax.runtime.errors import UserError

Sampling = Literal["natural", "balanced"]
_WORD = 2**64


def permutation(count: int, seed: int, epoch: int, stream: int = 0) -> npt.NDArray[np.int64]:
    """The permutation of `count` positions that belongs to (seed, epoch, stream): int64 [count].

    It sorts the raw words of a Philox4x64 counter generator (Salmon et al. 2011, "Parallel random numbers: as
    easy as 1, 2, 3"). numpy keeps the raw words of a bit generator stable between its versions, which it does
    not promise for `Generator.permutation`.
    """
    # As uint64 arrays: numpy turns a list with an int above 2**63 into floats.
    key = np.array([seed % _WORD, epoch], np.uint64)
    generator = np.random.Philox(key=key, counter=np.array([0, 0, 0, stream], np.uint64))
    return np.argsort(generator.random_raw(count), kind="stable").astype(np.int64, copy=False)


class TrainOrder:
    """Which training examples each step reads.

    Args:
        examples: number of training examples, or their labels, int [n], which balanced sampling needs.
        batch_size: examples per step over all processes.
        seed: the run's seed; any integer.
        sampling: "natural" reads each example once an epoch. "balanced" gives position p of the stream to
            class p % C and lets each class run through permutations of its own, so that the class counts of a
            batch differ by at most one, and an epoch is n positions of that stream.

    Raises:
        UserError: there is no example, batch_size is below one or above the number of examples, or balanced
            sampling meets unlabelled examples or a single class.
    """

    def __init__(
        self, examples: int | npt.ArrayLike, batch_size: int, seed: int, sampling: Sampling = "natural"
    ) -> None:
        labels = None if isinstance(examples, (int, np.integer)) else np.asarray(examples)
        self.count = int(examples) if labels is None else len(labels)  # type: ignore[arg-type]
        self.batch_size = int(batch_size)
        self.seed = int(seed)
        self.sampling = sampling
        if self.count < 1:
            raise UserError(
                "The training split is empty: check data.train_fraction and the labels of the store."
            )
        if self.batch_size < 1:
            raise UserError(f"train.batch_size is {self.batch_size}; it must be at least 1.")
        if self.batch_size > self.count:
            raise UserError(
                f"train.batch_size is {self.batch_size}, but the training split has only {self.count} "
                f"examples: set train.batch_size to {self.count} or less."
            )
        self._members = _members(self.count, labels, sampling)
        # An epoch boundary inside a batch uses two permutations of a class, hence two kept for each.
        self._permutation: Callable[[int, int], npt.NDArray[np.int64]] = lru_cache(
            maxsize=2 * len(self._members)
        )(self._make_permutation)

    def _make_permutation(self, stream: int, epoch: int) -> npt.NDArray[np.int64]:
        members = self._members[stream]
        order = permutation(len(members), self.seed, epoch, stream)
        return members[order]

    def indices(self, step: int) -> npt.NDArray[np.int64]:
        """Positions in the list of training examples that `step` reads, int64 [batch_size]."""
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        start = step * self.batch_size
        streams = len(self._members)
        batch = np.empty(self.batch_size, np.int64)
        for stream in range(streams):
            # The first stream position >= start that belongs to this class, then every `streams`-th.
            first = (stream - start) % streams
            wanted = len(range(first, self.batch_size, streams))
            batch[first::streams] = self._take(stream, (start + first) // streams, wanted)
        return batch

    def _take(self, stream: int, start: int, count: int) -> npt.NDArray[np.int64]:
        """Draws [start, start + count) of one class's stream of permutations."""
        size = len(self._members[stream])
        parts = []
        while count > 0:
            epoch, offset = divmod(start, size)
            part = self._permutation(stream, epoch)[offset : offset + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def epoch_end_step(self, epoch: int) -> int:
        """Number of steps after which `epoch` epochs have been read: ceil(epoch * n / batch_size)."""
        return -(-epoch * self.count // self.batch_size)

    def epochs_read(self, step: int) -> int:
        """Number of whole epochs that the first `step` steps have read."""
        return step * self.batch_size // self.count


def _members(
    count: int, labels: npt.NDArray[np.integer] | None, sampling: str
) -> list[npt.NDArray[np.int64]]:
    """The example positions of each stream: all of them, or one array per class."""
    if sampling == "natural":
        return [np.arange(count, dtype=np.int64)]
    if sampling != "balanced":
        raise UserError(f"data.sampling is {sampling!r}; it must be 'natural' or 'balanced'.")
    if labels is None:
        raise ValueError("balanced sampling needs the labels of the training examples, not their number")
    if (labels < 0).any():
        raise UserError(
            "data.sampling = 'balanced' needs a label for every training example; some have none."
        )
    classes = np.unique(labels)
    if len(classes) < 2:
        raise UserError(
            f"data.sampling = 'balanced' needs two classes or more, but every training example has label "
            f"{classes[0]}: use data.sampling = 'natural' or another split."
        )
    return [np.flatnonzero(labels == label).astype(np.int64) for label in classes]
