from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny

from pcam_jax.data.store import Store, open_store
from pcam_jax.inference.forward import Forward
from pcam_jax.models.registry import build_model
from pcam_jax.runtime import sharding
from pcam_jax.runtime.errors import Interrupted
from pcam_jax.runtime.signals import StopSignals


@pytest.fixture(scope="module")
def forward() -> tuple[Forward, Any]:
    tiny.register()
    net = build_model("tiny", image_shape=tiny.IMAGE_SHAPE, outputs=1)
    mesh = sharding.make_mesh()
    return Forward(net, "unit", mesh), sharding.put(net.init(jax.random.key(0)), sharding.replicated(mesh))


@pytest.fixture(scope="module")
def store(tiny_store: Path) -> Store:
    return open_store(tiny_store)


def test_every_example_has_its_logit_whatever_the_batch_size(forward: Any, store: Store) -> None:
    run, weights = forward
    positions = np.random.default_rng(0).permutation(len(store))[:37]
    found = [run.logits(weights, run.loader(store, positions, size)) for size in (8, 16, 64)]
    assert found[0].shape == (37, 1)
    for other in found[1:]:
        np.testing.assert_allclose(found[0], other, rtol=1e-5, atol=1e-6)


def test_a_logit_depends_on_its_image_alone(forward: Any, store: Store) -> None:
    run, weights = forward
    positions = np.arange(30)
    straight = run.logits(weights, run.loader(store, positions, 8))
    order = np.random.default_rng(1).permutation(30)
    shuffled = run.logits(weights, run.loader(store, positions[order], 8))
    np.testing.assert_array_equal(shuffled, straight[order])
    alone = run.logits(weights, run.loader(store, positions[29:], 8))
    np.testing.assert_array_equal(alone[0], straight[29])


def test_nothing_gives_nothing(forward: Any, store: Store) -> None:
    run, weights = forward
    assert run.logits(weights, run.loader(store, np.arange(0), 8)).shape == (0, 1)


def test_a_signal_stops_between_batches(forward: Any, store: Store) -> None:
    run, weights = forward
    loader = run.loader(store, np.arange(60), 2)
    with StopSignals() as stop:
        threading.Timer(0, lambda: signal.raise_signal(signal.SIGTERM)).start()
        while not stop.requested:
            pass
        with pytest.raises(Interrupted):
            run.logits(weights, loader, stop)


EIGHT_DEVICES = """
import sys, numpy as np, jax
jax.config.update("jax_num_cpu_devices", 8)
sys.path.insert(0, "tests")
import tiny
tiny.register()
from pcam_jax.data.store import open_store
from pcam_jax.inference.forward import Forward
from pcam_jax.models.registry import build_model
from pcam_jax.runtime import sharding
store, mesh = open_store(sys.argv[1]), sharding.make_mesh()
net = build_model("tiny", image_shape=tiny.IMAGE_SHAPE, outputs=1)
run = Forward(net, "unit", mesh)
weights = sharding.put(net.init(jax.random.key(0)), sharding.replicated(mesh))
assert run.batch_size(9) == 16
np.save(sys.argv[2], run.logits(weights, run.loader(store, np.arange(37), 9)))
"""


def test_eight_devices_agree_with_one(forward: Any, store: Store, tmp_path: Path) -> None:
    run, weights = forward
    command = [sys.executable, "-W", "error", "-c", EIGHT_DEVICES, store.path, tmp_path / "logits.npy"]
    subprocess.run(command, check=True, timeout=120, cwd=Path(__file__).parents[2])
    expected = run.logits(weights, run.loader(store, np.arange(37), 8))
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, rtol=1e-4, atol=1e-5)
