"""Disks that are full, read-only or lying: one sentence, nothing half-written, and the run goes on afterwards."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from pcam_jax.data.store import open_store
from pcam_jax.run.folder import open_run
from pcam_jax.runtime.command import outcome
from pcam_jax.runtime.errors import UserError

Train = Callable[..., Any]
Verb = Callable[..., subprocess.CompletedProcess[str]]
ROOT = Path(__file__).parents[2]


class Disk:
    """A file system of its own in memory, that can be full and read-only."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", self.path], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("only root may mount a small disk")
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", path], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def sentence(error: BaseException) -> str:
    """What a person would read; the exit code must be that of a mistake, not of a bug."""
    code, said = outcome(error)
    assert code == 2, error
    assert said is not None
    assert said.startswith("error: ")
    assert "\n" not in said
    return said


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, train_tiny: Train) -> Path:
    return train_tiny(tmp_path_factory.mktemp("straight") / "run", checkpoint__every_steps=1).path


def sizes_of_a_run(run: Path) -> list[int]:
    return sorted(path.stat().st_size for path in run.rglob("*") if path.is_file())


@pytest.mark.parametrize("kilobytes", [4, 12, 40, 80, 120])
def test_a_disk_that_fills_up_ends_training_and_space_lets_it_go_on(
    disk: Disk, train_tiny: Train, straight: Path, kilobytes: int
) -> None:
    run, settings = disk.path / "run", {"checkpoint__every_steps": 1, "checkpoint__keep": 99}
    disk.remount(f"size={kilobytes}k")
    with pytest.raises((UserError, OSError)) as failure:
        train_tiny(run, **settings)
    assert "the disk is full; free some space" in sentence(failure.value)
    disk.remount("size=64m")
    train_tiny(run, resume=True, **settings)
    assert not tiny.differing_arrays(tiny.final_arrays(run), tiny.final_arrays(straight))
    assert tiny.same_history(run, straight)
    assert not list(run.rglob("*.tmp"))


@pytest.mark.parametrize("size", [6000, 20000])
def test_files_that_may_not_grow_end_training_with_one_sentence(
    verb: Verb, train_tiny: Train, tiny_store: Path, straight: Path, tmp_path: Path, size: int
) -> None:
    """What a full disk does, where nobody may mount one; with the threads of TensorBoard and of the writer."""
    settings = {"checkpoint__every_steps": 1, "tracking__tensorboard": True}
    options = tiny.as_options(tiny.settings(tiny_store, **settings))
    run = tmp_path / "run"
    done = verb("--largest-file", size, "train", "--workdir", run, *options)
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(r"error: [^\n]*(largest size allowed here|disk is full)[^\n]*\n", done.stderr)
    train_tiny(run, resume=True, **settings)
    assert not tiny.differing_arrays(tiny.final_arrays(run), tiny.final_arrays(straight))


def test_a_full_disk_leaves_the_old_submission(
    disk: Disk, verb: Verb, tiny_run: Path, tiny_store: Path
) -> None:
    (disk.path / "out.csv").write_text("old")
    disk.remount("size=4k")
    done = verb("predict", tiny_run, tiny_store, "--output", disk.path / "out.csv")
    assert done.returncode == 2
    assert "the disk is full" in done.stderr
    assert (disk.path / "out.csv").read_text() == "old"
    assert os.listdir(disk.path) == ["out.csv"]


def test_a_read_only_place_is_said_to_be(
    disk: Disk, train_tiny: Train, tiny_run: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_run, disk.path / "run")
    disk.remount("ro")
    for name, resume in (("new", False), ("run", True)):
        with pytest.raises((UserError, OSError)) as failure:
            train_tiny(disk.path / name, resume=resume, checkpoint__every_steps=4)
        assert "the file system is read-only; choose another folder" in sentence(failure.value)


def test_a_run_on_a_read_only_disk_predicts(
    disk: Disk, verb: Verb, tiny_run: Path, tiny_store: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_run, disk.path / "run")
    disk.remount("ro")
    done = verb("predict", disk.path / "run", tiny_store, "--output", tmp_path / "out.csv")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.csv").is_file()
    done = verb("predict", disk.path / "run", tiny_store, "--output", disk.path / "out.csv")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "the file system is read-only" in done.stderr


def test_a_disk_that_turns_read_only_ends_training(disk: Disk, train_tiny: Train, straight: Path) -> None:
    run = disk.path / "run"

    def freeze(line: str) -> None:
        if line.startswith("epoch   1"):
            # the lock's descriptor keeps the mount busy, so only what is below can be frozen
            subprocess.run(["mount", "--bind", run, run], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", run], check=True)

    with pytest.raises((UserError, OSError)) as failure:
        train_tiny(run, say=freeze, checkpoint__every_steps=1)
    subprocess.run(["umount", "-l", run], check=True)
    assert re.search(r"read-only|cannot be written to", sentence(failure.value))
    train_tiny(run, resume=True, checkpoint__every_steps=1)
    assert not tiny.differing_arrays(tiny.final_arrays(run), tiny.final_arrays(straight))


@pytest.mark.parametrize("how", ["flip", "cut", "missing"])
def test_damage_to_the_latest_checkpoint_costs_one_save_and_is_said(
    verb: Verb, tiny_run: Path, tiny_store: Path, straight: Path, tmp_path: Path, how: str
) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    (run / "result.json").unlink()
    steps = open_run(run).checkpoints.steps()
    data = max((run / f"checkpoints/{steps[-1]}/state").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    if how == "missing":
        data.unlink()
    else:
        data.write_bytes(content if how == "flip" else content[:-1])
    settings = tiny.settings(tiny_store, checkpoint__every_steps=4)
    done = verb("train", "--workdir", run, "--resume", *tiny.as_options(settings))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    name = data.relative_to(run / f"checkpoints/{steps[-1]}").as_posix()
    what = "is missing" if how == "missing" else "has changed"
    assert (
        f"checkpoint {steps[-1]} is damaged (its file {name} {what}); going back to the one before it\n"
        in done.stdout
    )
    assert f"Resuming at step {steps[-2]} of" in done.stdout
    assert not tiny.differing_arrays(tiny.final_arrays(run), tiny.final_arrays(straight))
    assert tiny.same_history(run, straight)


@pytest.fixture
def copied_store(tiny_store: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_store, tmp_path / "store"))


def test_a_store_with_a_cut_array_is_refused_when_it_is_opened(
    train_tiny: Train, copied_store: Path, tmp_path: Path
) -> None:
    shard = copied_store / "images-00000.npy"
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(UserError, match=r"is damaged: .*images-00000.npy"):
        train_tiny(tmp_path / "run", store=copied_store)
    assert not (tmp_path / "run").exists()


def test_a_store_that_is_cut_while_it_is_read_ends_training_with_a_sentence(
    train_tiny: Train, copied_store: Path, tmp_path: Path
) -> None:
    shard = copied_store / "images-00000.npy"
    whole = shard.read_bytes()

    def cut(line: str) -> None:
        if line.startswith("epoch   1"):
            os.truncate(shard, 1000)

    with pytest.raises(UserError, match=r"images-00000.npy was cut short while it was read"):
        train_tiny(tmp_path / "run", store=copied_store, say=cut)
    shard.write_bytes(whole)
    train_tiny(tmp_path / "run", store=copied_store, resume=True)
    assert [row["epoch"] for row in open_run(tmp_path / "run").history()] == [1, 2, 3]


def test_resuming_on_altered_data_is_refused(train_tiny: Train, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    tiny.make_tiny_store(one)
    train_tiny(tmp_path / "run", store=one, train__epochs=1)
    tiny.make_tiny_store(other, seed=1)
    assert not np.array_equal(open_store(one).image(0), open_store(other).image(0))
    with pytest.raises(UserError, match="was trained on other data"):
        train_tiny(tmp_path / "run", store=other, train__epochs=1, resume=True)
