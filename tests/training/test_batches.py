from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from pcam_jax.data.order import TrainOrder
from pcam_jax.data.store import open_store
from pcam_jax.runtime import accelerator, sharding
from pcam_jax.training.batches import HostBatches, ResidentBatches, place_batches


def pieces(store_path: Path, sampling: str) -> tuple:
    store = open_store(store_path)
    positions = np.flatnonzero(store.labels >= 0)[::3]
    order = TrainOrder(store.labels[positions], 8, 3, sampling)  # type: ignore[arg-type]
    return store, positions, order, sharding.make_mesh()


@pytest.mark.parametrize("sampling", ["natural", "balanced"])
def test_both_homes_give_the_same_batches(tiny_store: Path, sampling: str) -> None:
    store, positions, order, mesh = pieces(tiny_store, sampling)
    host = HostBatches(store, positions, order, mesh)
    resident = ResidentBatches(store, positions, order, mesh)
    take = resident.adapt(lambda state, images, labels: (images, labels))
    steps = 0
    for step, (sent, indexed) in enumerate(zip(host.arguments(2, 9), resident.arguments(2, 9), strict=True)):
        images, labels = jax.jit(take)(None, *indexed)
        rows = positions[order.indices(2 + step)]
        np.testing.assert_array_equal(images, sent[0])
        np.testing.assert_array_equal(labels, sent[1])
        np.testing.assert_array_equal(images, store.gather(rows))
        np.testing.assert_array_equal(labels, store.labels[rows])
        assert images.dtype == np.uint8
        steps += 1
    assert steps == 7


def test_no_steps_give_no_batches(tiny_store: Path) -> None:
    store, positions, order, mesh = pieces(tiny_store, "natural")
    for batches in (
        HostBatches(store, positions, order, mesh),
        ResidentBatches(store, positions, order, mesh),
    ):
        assert list(batches.arguments(5, 5)) == []


def test_auto_keeps_images_on_the_host_where_the_device_is_the_host(tiny_store: Path) -> None:
    store, positions, order, mesh = pieces(tiny_store, "natural")
    said: list[str] = []
    assert place_batches("auto", store, positions, order, mesh, said.append).home == "on the host"
    assert place_batches("device", store, positions, order, mesh, said.append).home == "on the device"
    assert not said


@pytest.mark.parametrize(("asked", "words"), [("auto", 0), ("device", 1)])
def test_images_that_do_not_fit_stay_on_the_host(
    tiny_store: Path, monkeypatch: pytest.MonkeyPatch, asked: str, words: int
) -> None:
    store, positions, order, mesh = pieces(tiny_store, "natural")
    said: list[str] = []
    monkeypatch.setattr(accelerator, "device_memory_free", lambda: 1000)
    batches = place_batches(asked, store, positions, order, mesh, said.append)  # type: ignore[arg-type]
    assert batches.home == "on the host"
    assert len(said) == words
    monkeypatch.setattr(accelerator, "device_memory_free", lambda: 10**9)
    assert place_batches("auto", store, positions, order, mesh, said.append).home == "on the device"


SHARDED = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
import numpy as np
from pcam_jax.data.order import TrainOrder
from pcam_jax.data.store import open_store
from pcam_jax.runtime import sharding
from pcam_jax.training.batches import HostBatches, ResidentBatches
store = open_store(sys.argv[1])
positions = np.flatnonzero(store.labels >= 0)[:59]
order = TrainOrder(len(positions), 16, 0)
mesh = sharding.make_mesh()
split = sharding.batch_sharding(mesh)
host, resident = (kind(store, positions, order, mesh) for kind in (HostBatches, ResidentBatches))
take = jax.jit(resident.adapt(lambda state, images, labels: (images, labels)), out_shardings=split)
for step, (sent, indexed) in enumerate(zip(host.arguments(0, 5), resident.arguments(0, 5))):
    images, labels = take(None, *indexed)
    assert images.sharding.is_equivalent_to(split, 4) and sent[0].sharding.is_equivalent_to(split, 4)
    assert np.array_equal(images, sent[0]) and np.array_equal(labels, sent[1])
    assert np.array_equal(images, store.gather(positions[order.indices(step)]))
shares = [shard.data.nbytes for shard in resident._images.addressable_shards]
assert len(set(shares)) == 1 and sum(shares) <= store.gather(positions).nbytes * 64 / 59 + 1
# no device ever holds all images: the largest array of the program is smaller
program = take.lower(None, *indexed).compile()
print(program.memory_analysis().temp_size_in_bytes, store.gather(positions).nbytes)
"""


def test_eight_devices_share_the_images_and_no_one_gathers_them_all(tiny_store: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SHARDED, tiny_store],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    scratch, everything = map(int, done.stdout.split())
    assert scratch < everything
