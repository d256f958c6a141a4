from __future__ import annotations

import importlib.util
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from pcam_jax.runtime.distributed import HEARTBEAT_SECONDS

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts/simulate_scaling.py"


@pytest.fixture(scope="module")
def scaling() -> Iterator[ModuleType]:
    specification = importlib.util.spec_from_file_location("simulate_scaling", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = sys.modules["simulate_scaling"] = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    yield module
    del sys.modules["simulate_scaling"]


def test_the_page_shows_what_the_script_prints() -> None:
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    page = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    assert done.stdout.strip() in page


def test_the_page_states_the_constants(scaling: ModuleType) -> None:
    page = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    constants = scaling.Measured()
    assert f"{constants.order_seconds * 1e6:.2g} us an image, {constants.order_bytes:g} bytes" in page
    assert f"{constants.index_seconds * 1e6:.2g} us and {constants.index_bytes:g} bytes a row" in page
    assert f"{constants.gather_bytes_per_second / 1e9:g} GB/s" in page
    assert f"{constants.save_bytes_per_second / 1e9:g} GB/s" in page
    assert constants.detect_seconds == HEARTBEAT_SECONDS


def test_one_device_alone_waits_for_nobody(scaling: ModuleType) -> None:
    one = scaling.forecast(scaling.Job(images=1e6), 1, devices=1)
    assert one.reduce == 0
    assert one.step == one.compute == 256 / 20_000
    assert one.efficiency == 1


def test_the_formulas_by_hand(scaling: ModuleType) -> None:
    job = scaling.Job(images=1e6, image_bytes=1000, parameters=1e6, rate=1000, batch=100, save_seconds=100)
    measured = scaling.Measured(
        order_seconds=1e-6,
        order_bytes=40,
        index_seconds=1e-6,
        index_bytes=60,
        save_bytes_per_second=1.6e6,
        restart_seconds=3,
        detect_seconds=2,
    )
    assumed = scaling.Assumed(
        devices_per_host=4,
        storage_bytes_per_second=1e6,
        network_bytes_per_second=1e8,
        latency_seconds=1e-3,
        hours_between_failures=1,
        start_seconds=4,
    )
    found = scaling.forecast(job, 2, measured, assumed)
    assert found.devices == 8
    assert found.reduce == pytest.approx(2 * 7 / 8 * 4e6 / 1e8 + 2 * 3 * 1e-3)
    assert found.load == pytest.approx(4 * 100 * 1000 / 1e6)  # 0.4 s: longer than the step's 0.1 s
    assert found.step == found.load
    assert found.efficiency == pytest.approx(0.25)
    assert found.host_read == pytest.approx(1e6)
    assert found.epoch == pytest.approx(1250 * 0.4 + 1)
    assert found.memory == pytest.approx(1e8)
    assert found.save == pytest.approx(10)
    assert found.goodput == pytest.approx(1 - 2 / 3600 * (50 + 2 + 4 + 3 + 2))


def test_more_hosts_are_never_slower_and_never_more_efficient(scaling: ModuleType) -> None:
    rows = [scaling.forecast(scaling.Job(), 2**power) for power in range(12)]
    for fewer, more in itertools.pairwise(rows):
        assert more.epoch <= fewer.epoch
        assert more.efficiency <= fewer.efficiency + 1e-12
        assert more.goodput <= fewer.goodput
    assert all(0 <= row.goodput <= 1 and math.isfinite(row.step) for row in rows)


def test_this_machine_can_be_measured(scaling: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    found = scaling.measure(share=0.01)
    assert all(value > 0 for value in vars(found).values())
    assert json.dumps(vars(found))
