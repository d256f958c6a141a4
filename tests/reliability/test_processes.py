"""Several real processes on one machine, as on several: they train, save, predict and stop as one."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from pcam_jax.run.folder import open_run
from pcam_jax.runtime.distributed import HEARTBEAT_SECONDS

Train = Callable[..., Any]
ROOT = Path(__file__).parents[2]
SETTINGS = {
    "augment__horizontal_flip": True,
    "optimizer__name": "sgd",
    "optimizer__momentum": 0.9,
    "optimizer__peak_lr": 0.05,
    "optimizer__schedule": "constant",
    "checkpoint__every_steps": 4,
    "checkpoint__keep": 9,
}
LONG = {**SETTINGS, "train__epochs": 100_000, "checkpoint__keep": 2}


class Group:
    """Processes that were started together."""

    def __init__(self, count: int, arguments: tuple[Any, ...], folders: list[Path]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        command = [sys.executable, "-u", "-W", "error", ROOT / "tests/tiny.py", *map(str, arguments)]
        self.processes = [
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=folders[number],
                env={
                    **os.environ,
                    "JAX_COORDINATOR_ADDRESS": address,
                    "JAX_NUM_PROCESSES": str(count),
                    "JAX_PROCESS_ID": str(number),
                },
            )
            for number in range(count)
        ]
        self.said = [list[str]() for _ in self.processes]
        self._readers = [
            threading.Thread(target=self._read, args=(number, stream), daemon=True)
            for number, process in enumerate(self.processes)
            for stream in (process.stdout, process.stderr)
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, number: int, stream: Any) -> None:
        for line in stream:
            self.said[number].append(line.rstrip("\n"))

    def close(self) -> None:
        """Close what was read, once all have ended."""
        for reader in self._readers:
            reader.join(timeout=10)
        for process in self.processes:
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()

    def wait_for(self, words: str) -> None:
        """Until the first process has said something."""
        deadline = time.monotonic() + 120
        while not any(words in line for line in self.said[0]):
            assert time.monotonic() < deadline, self.said
            assert self.processes[0].poll() is None, self.said
            time.sleep(0.02)

    def codes(self, seconds: float = 120) -> list[int]:
        """Exit codes of all, which must come within some seconds."""
        deadline = time.monotonic() + seconds
        codes = [process.wait(timeout=max(0.1, deadline - time.monotonic())) for process in self.processes]
        for reader in self._readers:
            reader.join(timeout=10)
        return codes


@pytest.fixture
def together(tmp_path: Path) -> Iterator[Callable[..., Group]]:
    """Starts a verb in several processes, each in a folder of its own: ``together(2, "train", ...)``."""
    groups: list[Group] = []

    def start(count: int, *arguments: Any) -> Group:
        folders = [tmp_path / f"machine{number}" for number in range(count)]
        for folder in folders:
            folder.mkdir(exist_ok=True)
        groups.append(Group(count, arguments, folders))
        return groups[-1]

    yield start
    for group in groups:
        for process in group.processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()
        group.close()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, train_tiny: Train) -> Path:
    return train_tiny(tmp_path_factory.mktemp("processes") / "alone", **SETTINGS).path


def options(store: Path, **overrides: Any) -> list[str]:
    return tiny.as_options(tiny.settings(store, **{**SETTINGS, **overrides}))


def assert_close(run: Path, other: Path) -> None:
    names = ("train_loss", "train_accuracy", "validation_loss", "validation_auroc")
    left, right = (
        [[row[name] for name in names] for row in open_run(path).history()] for path in (run, other)
    )
    np.testing.assert_allclose(left, right, rtol=1e-4)
    ours, theirs = tiny.final_arrays(run), tiny.final_arrays(other)
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_two_processes_train_as_one_and_the_first_alone_writes(
    together: Callable[..., Group], tiny_store: Path, alone: Path, tmp_path: Path
) -> None:
    # a relative workdir, so that each process would write into a folder of its own
    group = together(2, "train", "--workdir", "run", *options(tiny_store))
    assert group.codes() == [0, 0], group.said
    assert_close(tmp_path / "machine0/run", alone)
    assert list((tmp_path / "machine1").iterdir()) == []
    assert any("2 x CPU" in line and "in 2 processes" in line for line in group.said[0])
    assert not [line for line in group.said[1] if "Gloo" not in line]
    # and one goes on with what two began, in the same order
    run = tiny.cut(tmp_path / "machine0/run", tmp_path / "moved", 8)
    resumed = together(1, "train", "--workdir", run, "--resume", *options(tiny_store))
    assert resumed.codes() == [0]
    assert "Resuming at step 8 of 16." in resumed.said[0]
    assert_close(run, alone)


def test_four_processes_go_on_with_what_one_began(
    together: Callable[..., Group], tiny_store: Path, alone: Path, tmp_path: Path
) -> None:
    run = tiny.cut(alone, tmp_path / "moved", 8)
    settings = options(tiny_store, data__placement="device")
    group = together(4, "train", "--workdir", run, "--resume", *settings)
    assert group.codes() == [0] * 4, group.said
    assert_close(run, alone)


@pytest.mark.parametrize(("count", "victim"), [(2, 0), (4, 2)])
def test_the_death_of_one_stops_all_with_a_word_and_one_goes_on(
    together: Callable[..., Group],
    tiny_store: Path,
    train_tiny: Train,
    tmp_path: Path,
    count: int,
    victim: int,
) -> None:
    run = tmp_path / "machine0/run"
    group = together(count, "train", "--workdir", "run", *options(tiny_store, **LONG))
    group.wait_for("epoch   2")
    group.processes[victim].kill()
    killed = time.monotonic()
    codes = group.codes(HEARTBEAT_SECONDS + 30)
    assert time.monotonic() - killed < HEARTBEAT_SECONDS + 30
    assert codes[victim] == -signal.SIGKILL
    for other in set(range(count)) - {victim}:
        assert codes[other] == 2, group.said
        assert group.said[other][-1].startswith("error: another process of this run has ended")
        assert group.said[other][-1].endswith("--resume.")
    # fewer processes go on where it was saved, and get the same batches as if nothing had happened
    saved = open_run(run).checkpoints.steps()[-1]
    epochs = int(open_run(run).checkpoints.load(saved).progress["control"]["epoch"]) + 1
    settings = {**LONG, "train__epochs": 100_000, "train__max_seconds": 1e-3}
    said: list[str] = []
    train_tiny(run, resume=True, say=said.append, **settings)
    assert f"Resuming at step {saved} of" in " ".join(said)
    straight = train_tiny(tmp_path / "straight", **{**LONG, "train__epochs": epochs}).path
    rows, expected = open_run(run).history()[:epochs], open_run(straight).history()
    np.testing.assert_allclose(
        [row["train_loss"] for row in rows], [row["train_loss"] for row in expected], rtol=1e-3
    )


def test_a_signal_to_one_stops_all_after_the_same_step(
    together: Callable[..., Group], tiny_store: Path, tmp_path: Path
) -> None:
    group = together(2, "train", "--workdir", "run", *options(tiny_store, **LONG))
    group.wait_for("epoch   2")
    group.processes[1].terminate()
    assert group.codes() == [143, 143], group.said
    step = open_run(tmp_path / "machine0/run").checkpoints.steps()[-1]
    assert any(line.startswith(f"Stopped at step {step} of") for line in group.said[0])
    assert any(line.startswith(f"Stopped at step {step} of") for line in group.said[1])


def test_a_refusal_of_the_first_ends_all(
    together: Callable[..., Group], tiny_store: Path, alone: Path
) -> None:
    group = together(2, "train", "--workdir", alone, *options(tiny_store))
    assert group.codes(60) == [2, 2]
    for said in group.said:
        assert any("already holds a run: add --resume" in line for line in said)


def test_two_processes_predict_the_bytes_of_one(
    together: Callable[..., Group], tiny_run: Path, tiny_store: Path, tmp_path: Path
) -> None:
    from pcam_jax.data.store import open_store, write_store

    store = open_store(tiny_store)
    rows = np.resize(np.arange(len(store)), 300)
    index = store.index.iloc[rows].assign(id=[f"p{n}" for n in range(300)], split="test", label=-1)
    write_store(tmp_path / "many", store.gather(rows), index.reset_index(drop=True), store.class_names)
    for count in (1, 2):
        group = together(
            count, "predict", tiny_run, tmp_path / "many", "--output", f"{count}.csv", "--tta", "d4"
        )
        assert group.codes() == [0] * count, group.said
    machine = tmp_path / "machine0"
    assert (machine / "1.csv").read_bytes() == (machine / "2.csv").read_bytes()
    assert list((tmp_path / "machine1").iterdir()) == []


def test_two_processes_evaluate_to_the_figures_of_one_and_the_first_alone_writes(
    together: Callable[..., Group], tiny_run: Path, tmp_path: Path
) -> None:
    written = {}
    for count in (1, 2):
        for number in range(count):  # a copy each, as on machines without a common disk
            shutil.rmtree(tmp_path / f"machine{number}", ignore_errors=True)
            shutil.copytree(tiny_run, tmp_path / f"machine{number}/run")
        options = ("--resamples", 100, "--threshold", "youden", "--no-report")
        group = together(count, "evaluate", "run", *options)
        assert group.codes() == [0] * count, group.said
        assert any("AUROC" in line for line in group.said[0])
        run = tmp_path / "machine0/run"
        figures = json.loads((run / "predictions/validation.json").read_text())
        del figures["images_per_second"]
        table = (run / "predictions/validation.csv").read_bytes()
        written[count] = (table, figures, (run / "operating_point.json").read_bytes())
    assert written[1] == written[2]
    assert not [line for line in group.said[1] if "Gloo" not in line]
    assert not (tmp_path / "machine1/run/predictions").exists()
    assert not (tmp_path / "machine1/run/operating_point.json").exists()
