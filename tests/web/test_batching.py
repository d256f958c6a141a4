"""Rows of many callers through a function of fixed sizes."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, wait
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pcam_jax.web.batching import Batcher, Busy, batch_size, batch_sizes


class Doubler:
    """Doubles rows, keeps the sizes it was called with, and can be held up."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        self.entered.release()
        self.gate.wait()
        self.sizes.append(len(rows))
        if (rows < 0).any():
            raise ArithmeticError("below zero")
        return rows * 2


def held(doubler: Doubler, batcher: Batcher) -> Future[np.ndarray]:
    """Keep the thread busy with one row."""
    doubler.gate.clear()
    first = batcher.submit(np.array([1]))
    doubler.entered.acquire()
    return first


def test_every_caller_gets_its_own_rows() -> None:
    doubler = Doubler()
    batcher = Batcher(doubler, (1, 4, 16), 10_000)
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 1000, rng.integers(1, 40)) for _ in range(60)]
    futures: list[Any] = [None] * len(rows)

    def submit(start: int) -> None:
        for number in range(start, len(rows), 4):
            futures[number] = batcher.submit(rows[number])

    threads = [threading.Thread(target=submit, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for own, future in zip(rows, futures, strict=True):
        np.testing.assert_array_equal(future.result(10), own * 2)
    batcher.close(10)
    assert set(doubler.sizes) <= {1, 4, 16}
    assert sum(doubler.sizes) >= sum(map(len, rows))
    assert batcher.waiting == 0


def test_what_waits_together_is_computed_together() -> None:
    doubler, seen = Doubler(), []
    batcher = Batcher(doubler, (1, 4, 16), 100, lambda size, real, seconds: seen.append((size, real)))
    first = held(doubler, batcher)
    others = [batcher.submit(np.array([number])) for number in range(15)]
    doubler.gate.set()
    wait([first, *others], 10)
    batcher.close(10)
    assert doubler.sizes == [1, 16]
    assert seen == [(1, 1), (16, 15)]


def test_a_full_queue_says_when_to_come_back() -> None:
    doubler = Doubler()
    batcher = Batcher(doubler, (1, 4), 6)
    assert batcher.warm_up(np.array(3))
    for _ in doubler.sizes:
        doubler.entered.acquire()
    first = held(doubler, batcher)
    kept = batcher.submit(np.zeros(4, int))
    with pytest.raises(Busy) as busy:
        batcher.submit(np.zeros(3, int))
    assert 1 <= busy.value.retry_after <= 60
    more = batcher.submit(np.zeros(2, int))
    assert batcher.waiting == 6
    doubler.gate.set()
    wait([first, kept, more], 10)
    batcher.check_room(6)
    alone = batcher.submit(np.ones(9, int))  # more than ever fit, but nobody else waits
    assert alone.result(10).tolist() == [2] * 9
    batcher.close(10)


def test_a_failure_reaches_those_of_its_batch_alone() -> None:
    doubler = Doubler()
    batcher = Batcher(doubler, (1,), 100)
    bad, good = batcher.submit(np.array([-1])), batcher.submit(np.array([5]))
    with pytest.raises(ArithmeticError):
        bad.result(10)
    assert good.result(10).tolist() == [10]
    batcher.close(10)


def test_a_cancelled_job_is_not_computed() -> None:
    doubler = Doubler()
    batcher = Batcher(doubler, (1,), 100)
    first = held(doubler, batcher)
    dropped, kept = batcher.submit(np.array([-1, -1])), batcher.submit(np.array([7]))
    assert dropped.cancel()
    doubler.gate.set()
    assert [first.result(10).tolist(), kept.result(10).tolist()] == [[2], [14]]
    batcher.close(10)
    assert doubler.sizes == [1, 1]
    assert batcher.waiting == 0


def test_closing_answers_what_was_taken() -> None:
    doubler = Doubler()
    batcher = Batcher(doubler, (1, 4), 100)
    held(doubler, batcher)
    futures = [batcher.submit(np.array([number])) for number in range(9)]
    closing = threading.Thread(target=batcher.close)
    closing.start()
    while not batcher._closed:
        time.sleep(0.001)
    with pytest.raises(RuntimeError):
        batcher.submit(np.array([1]))
    doubler.gate.set()
    closing.join(10)
    assert [future.result(0).tolist() for future in futures] == [[2 * number] for number in range(9)]


@given(st.integers(1, 500), st.integers(1, 128), st.sampled_from([1, 2, 8]))
def test_sizes_waste_little(rows: int, largest: int, devices: int) -> None:
    sizes = batch_sizes(largest, devices)
    assert all(size % devices == 0 for size in sizes)
    assert largest <= sizes[-1] < largest + devices
    left, computed = rows, 0
    while left > 0:
        size = batch_size(left, sizes)
        assert size in sizes
        computed += size
        left -= size
    assert computed <= rows / 0.75 + sizes[0]


def test_sizes_of_the_default() -> None:
    assert batch_sizes(64, 1) == (1, 4, 16, 64)
    assert [batch_size(rows, (1, 4, 16, 64)) for rows in (1, 2, 3, 11, 12, 47, 48, 64, 999)] == (
        [1, 1, 4, 4, 16, 16, 64, 64, 64]
    )
