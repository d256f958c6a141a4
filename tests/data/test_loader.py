import gc
import itertools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pcam_jax.data.loader import EvalLoader, TrainLoader
from pcam_jax.data.order import TrainOrder
from pcam_jax.data.store import Store, open_store, write_store
from pcam_jax.runtime.errors import UserError

COUNT = 50
law = settings(max_examples=25)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    """50 images of 8x8 in four shards, each recognisable by its own pixels."""
    return make_store(tmp_path_factory.mktemp("loader") / "store")


def make_store(path: Path) -> Store:
    images = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8, 3), np.uint8)
    index = pd.DataFrame({"id": [f"p{n}" for n in range(COUNT)], "label": np.arange(COUNT) % 2})
    return write_store(path, images, index, ("normal", "tumour"), images_per_shard=14)


class ArraySource:
    """Images in memory that may be slow or fail, in place of a disk that is."""

    def __init__(self, count: int = 40, seconds: float = 0.0, fail_on: int = -1) -> None:
        self.images = np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
        self.labels = np.arange(count, dtype=np.int32) % 2
        self.seconds, self.fail_on = seconds, fail_on
        self.reads = 0

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (2, 2, 3)

    def gather(self, indices, out=None):
        self.reads += 1
        if self.fail_on in indices:
            raise UserError("the disk is on fire")
        time.sleep(self.seconds)
        return self.images[indices]


def test_train_batches_follow_the_order(store):
    examples = np.arange(3, 45)
    order = TrainOrder(len(examples), 16, seed=5)
    loader = TrainLoader(store, examples, order, 2, 9)
    batches = list(loader)
    assert [batch["step"] for batch in batches] == list(range(2, 9))
    assert len(loader) == 7
    for batch in batches:
        rows = examples[order.indices(batch["step"])]
        assert batch["images"].dtype == np.uint8
        assert batch["labels"].dtype == np.int32
        np.testing.assert_array_equal(batch["images"], store.gather(rows))
        np.testing.assert_array_equal(batch["labels"], store.labels[rows])
    # All batches are still what they were: no buffer has been used again.
    assert not any(np.shares_memory(a["images"], b["images"]) for a, b in itertools.pairwise(batches))


@pytest.mark.parametrize("sampling", ["natural", "balanced"])
def test_a_resumed_loader_goes_on_where_the_first_stopped(store, sampling):
    examples = np.arange(COUNT)
    order = TrainOrder(store.labels[examples], 8, 1, sampling)
    whole = list(TrainLoader(store, examples, order, 0, 12))
    fresh = TrainOrder(store.labels[examples], 8, 1, sampling)
    rest = list(TrainLoader(store, examples, fresh, 7, 12))
    for one, other in zip(whole[7:], rest, strict=True):
        assert one["step"] == other["step"]
        np.testing.assert_array_equal(one["images"], other["images"])


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_one_global_batch(store, processes):
    order = TrainOrder(COUNT, 8, 0)
    whole = list(TrainLoader(store, range(COUNT), order, 0, 8))
    parts = [list(TrainLoader(store, range(COUNT), order, 0, 8, i, processes)) for i in range(processes)]
    for step, batch in enumerate(whole):
        for name in ("images", "labels"):
            joined = np.concatenate([part[step][name] for part in parts])
            np.testing.assert_array_equal(joined, batch[name])


@law
@given(st.integers(0, 40), st.integers(1, 12), st.integers(1, 3))
def test_evaluation_reads_every_example_once(count, share, processes):
    source = ArraySource()
    examples = np.random.default_rng(count).permutation(40)[:count]
    batch_size = share * processes
    seen: list[int] = []
    for index in range(processes):
        loader = EvalLoader(source, examples, batch_size, index, processes)
        batches = list(loader)
        assert len(batches) == len(loader) == -(-count // batch_size)
        for batch in batches:
            mask, positions = batch["mask"], batch["positions"]
            assert batch["images"].shape == (share, 2, 2, 3)
            assert batch["images"].dtype == np.uint8
            assert batch["labels"].dtype == np.int32
            assert mask.dtype == np.bool_
            assert (positions[~mask] == -1).all()
            assert (batch["images"][~mask] == 0).all()
            assert (batch["labels"][~mask] == 0).all()
            rows = examples[positions[mask]]
            np.testing.assert_array_equal(batch["images"][mask], source.images[rows])
            np.testing.assert_array_equal(batch["labels"][mask], source.labels[rows])
            seen.extend(positions[mask].tolist())
    assert sorted(seen) == list(range(count))


def test_an_evaluation_loader_can_be_read_again(store):
    loader = EvalLoader(store, range(20), 6)
    first, second = list(loader), list(loader)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one["images"], other["images"])
    np.testing.assert_array_equal(np.concatenate([b["positions"] for b in first])[:20], np.arange(20))


def test_a_cold_store_gives_the_same_bytes(store):
    for shard in store.manifest.shards:
        descriptor = os.open(store.path / shard.file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    batches = list(EvalLoader(open_store(store.path), range(COUNT), 10))
    images = np.concatenate([batch["images"] for batch in batches])
    np.testing.assert_array_equal(images, store.gather(np.arange(COUNT)))


def test_a_store_cut_while_it_is_read_is_a_sentence(tmp_path):
    store = make_store(tmp_path / "store")
    store.gather(np.arange(COUNT))  # everything is mapped
    shard = tmp_path / "store" / store.manifest.shards[2].file
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(UserError, match=r"images-00002\.npy was cut short"):
        list(EvalLoader(store, range(COUNT), 10))


def test_a_vanished_store_is_a_sentence(tmp_path):
    store = make_store(tmp_path / "store")
    os.unlink(tmp_path / "store" / store.manifest.shards[0].file)
    with pytest.raises(UserError, match=r"images-00000\.npy has vanished"):
        next(iter(EvalLoader(store, range(COUNT), 10)))


def test_an_error_in_the_thread_reaches_the_consumer():
    batches = iter(EvalLoader(ArraySource(fail_on=25), range(40), 10))
    assert len(list(itertools.islice(batches, 2))) == 2
    with pytest.raises(UserError, match="on fire"):
        next(batches)


def test_leaving_early_stops_the_thread():
    def readers() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name.startswith("grain-prefetch")}

    source = ArraySource(seconds=0.01)
    earlier = readers()
    for batch in TrainLoader(source, range(40), TrainOrder(40, 4, 0), 0, 10_000):
        assert readers() - earlier
        if batch["step"] == 3:
            break
    gc.collect()
    deadline = time.monotonic() + 10
    while readers() - earlier and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not readers() - earlier
    assert source.reads < 20


def test_waiting_is_measured():
    slow = EvalLoader(ArraySource(seconds=0.05), range(40), 10)
    list(slow)
    assert slow.waited_seconds > 0.1
    ready = EvalLoader(ArraySource(), range(40), 10)
    batches = iter(ready)
    for _ in range(4):
        time.sleep(0.1)  # the consumer is busy, the thread reads ahead
        next(batches)
    assert ready.waited_seconds < 0.1


def test_files_are_closed_with_the_loader(tmp_path):
    store = make_store(tmp_path / "store")

    def opened() -> int:
        links = [f"/proc/self/fd/{descriptor}" for descriptor in os.listdir("/proc/self/fd")]
        return sum(os.readlink(link).startswith(str(store.path)) for link in links if os.path.lexists(link))

    store.gather(np.arange(COUNT))  # the mappings hold files open too
    before = opened()
    loader = EvalLoader(store, range(COUNT), 10)
    list(loader)
    assert opened() > before
    del loader
    gc.collect()
    assert opened() == before


@pytest.mark.parametrize(
    ("batch_size", "processes", "sentence"),
    [(9, 2, "9, which 2 processes cannot share equally"), (0, 1, "must be at least 1")],
)
def test_impossible_batches_are_sentences(store, batch_size, processes, sentence):
    with pytest.raises(UserError, match=sentence):
        EvalLoader(store, range(COUNT), batch_size, 0, processes)
    if batch_size:
        with pytest.raises(UserError, match=r"train\.batch_size"):
            TrainLoader(store, range(COUNT), TrainOrder(COUNT, batch_size, 0), 0, 1, 0, processes)


def test_a_failing_consumer_leaves_no_thread_behind_at_exit(store):
    program = f"""
import numpy as np
from pcam_jax.data.loader import TrainLoader
from pcam_jax.data.order import TrainOrder
from pcam_jax.data.store import open_store
import sys
assert "jax" not in sys.modules
store = open_store({str(store.path)!r})
for batch in TrainLoader(store, range({COUNT}), TrainOrder({COUNT}, 8, 0), 0, 10**9):
    raise SystemExit(7)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], timeout=60, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (7, "")
