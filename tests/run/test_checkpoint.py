from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pcam_jax.run import checkpoint as module
from pcam_jax.run.checkpoint import PROGRESS, STATE, CheckpointError, Checkpoints, leaf_digest
from pcam_jax.runtime.errors import UserError

ARRAYS = {
    "params.conv.kernel": np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32),
    "opt_state.0.count": np.int32(7),
    "odd": np.array([-0.0, np.nan, np.inf, 1e-45], np.float32),
}
PROGRESS_VALUES: dict[str, Any] = {"control": {"best_value": float("nan")}, "history": [{"loss": 0.1 + 0.2}]}


def save(path: Path, *steps: int, keep: int = 2, best: int = -1) -> Checkpoints:
    checkpoints = Checkpoints(path, keep)
    for step in steps:
        checkpoints.save(step, {**ARRAYS, "step": np.int32(step)}, PROGRESS_VALUES, best)
    checkpoints.close()
    return checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 10 and 20, saved; copy before you damage it."""
    path = tmp_path_factory.mktemp("saved") / "checkpoints"
    save(path, 10, 20)
    return path


def test_what_is_saved_comes_back_bit_for_bit(saved: Path) -> None:
    loaded = Checkpoints(saved).load(20)
    assert loaded.step == 20
    expected = {**ARRAYS, "step": np.int32(20)}
    assert set(loaded.arrays) == set(expected)
    for name, array in loaded.arrays.items():
        assert isinstance(array, np.ndarray)
        assert (array.dtype, array.shape) == (expected[name].dtype, expected[name].shape)
        assert array.tobytes() == expected[name].tobytes()
    assert repr(loaded.progress["control"]) == repr(PROGRESS_VALUES["control"])
    assert loaded.progress["history"] == PROGRESS_VALUES["history"]


def test_device_arrays_are_saved_like_host_arrays(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, {"a": jnp.arange(3, dtype=jnp.float32), "b": jnp.int32(4)}, {}, -1)
    checkpoints.close()
    arrays = checkpoints.load(1).arrays
    assert arrays["a"].tolist() == [0, 1, 2]
    assert arrays["b"] == 4


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [(2, -1, [4, 5]), (1, -1, [5]), (2, 1, [1, 4, 5]), (2, 5, [4, 5]), (3, 2, [2, 3, 4, 5])],
)
def test_the_latest_and_the_best_are_kept(tmp_path: Path, keep: int, best: int, left: list[int]) -> None:
    checkpoints = save(tmp_path / "checkpoints", 1, 2, 3, 4, 5, keep=keep, best=best)
    assert checkpoints.steps() == left
    assert sorted(os.listdir(tmp_path / "checkpoints")) == sorted(map(str, left))


def test_a_step_that_is_already_saved_is_left_alone(tmp_path: Path) -> None:
    checkpoints = save(tmp_path / "checkpoints", 3)
    stamp = (tmp_path / "checkpoints/3" / PROGRESS).stat().st_mtime_ns
    checkpoints.save(3, {"other": np.zeros(1)}, {}, -1)
    checkpoints.close()
    assert (tmp_path / "checkpoints/3" / PROGRESS).stat().st_mtime_ns == stamp


def test_leftovers_of_a_crash_are_no_checkpoints_and_go_at_the_next_save(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints"
    save(path, 1)
    shutil.copytree(path / "1", path / "2.tmp")
    shutil.copytree(path / "1", path / "0.removed.tmp")
    (path / "notes.txt").write_text("mine")
    assert Checkpoints(path).steps() == [1]
    save(path, 2)
    assert sorted(os.listdir(path)) == ["1", "2", "notes.txt"]


def test_progress_is_copied_when_it_is_handed_over(tmp_path: Path) -> None:
    checkpoints, history = Checkpoints(tmp_path / "checkpoints"), [{"loss": 1.0}]
    checkpoints.save(1, ARRAYS, {"history": history}, -1)
    history.append({"loss": 2.0})
    checkpoints.close()
    assert checkpoints.load(1).progress["history"] == [{"loss": 1.0}]


def test_saving_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_go_on, real = threading.Event(), module.sync_tree

    def slow_disk(path: Any) -> None:
        may_go_on.wait(20)
        real(path)

    monkeypatch.setattr(module, "sync_tree", slow_disk)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    started = time.monotonic()
    checkpoints.save(1, ARRAYS, {}, -1)
    checkpoints.check()
    assert time.monotonic() - started < 10
    assert checkpoints.steps() == []
    may_go_on.set()
    checkpoints.wait()
    assert checkpoints.steps() == [1]
    checkpoints.close()


def rewrite_progress(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the progress of a checkpoint, its digest right afterwards."""
    values = json.loads((folder / PROGRESS).read_text())
    del values["digest"]
    change(values)
    values["digest"] = module._progress_digest(values)
    (folder / PROGRESS).write_text(json.dumps(values))


def damage(path: Path, how: str, place: float) -> None:
    content = bytearray(path.read_bytes())
    if how == "cut":
        path.write_bytes(content[: int(place * len(content))])
        return
    position = min(int(place * len(content)), len(content) - 1)
    content[position] ^= 1 << int(place * 8) % 8
    path.write_bytes(content)


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("how", ["flip", "cut", "empty", "missing"])
def test_damage_in_any_file_is_found(saved: Path, tmp_path: Path, how: str) -> None:
    names = files_of(saved / "20")
    assert len(names) > 4
    for name in names:
        shutil.rmtree(tmp_path / "20", ignore_errors=True)
        shutil.copytree(saved / "20", tmp_path / "20")
        victim = tmp_path / "20" / name
        if how == "missing":
            victim.unlink()
        elif how == "empty":
            victim.write_bytes(b"")
        else:
            damage(victim, how, 0.5)
        # one sentence, and nothing that orbax's threads print (warnings are errors here)
        with pytest.raises(CheckpointError, match=r"^checkpoint 20 is (damaged|unreadable) \(.*\)$"):
            Checkpoints(tmp_path).load(20)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(number=st.integers(0, 10**6), how=st.sampled_from(["flip", "cut"]), place=st.floats(0, 0.9999))
def test_damage_anywhere_is_found(saved: Path, tmp_path: Path, number: int, how: str, place: float) -> None:
    shutil.rmtree(tmp_path / "20", ignore_errors=True)
    shutil.copytree(saved / "20", tmp_path / "20")
    names = [name for name in files_of(saved / "20") if (saved / "20" / name).stat().st_size]
    damage(tmp_path / "20" / names[number % len(names)], how, place)
    with pytest.raises(CheckpointError):
        Checkpoints(tmp_path).load(20)


@pytest.mark.parametrize("leaf", ["params.conv.kernel", "opt_state.0.count"])
def test_a_wrong_number_is_found_by_our_own_digest(saved: Path, tmp_path: Path, leaf: str) -> None:
    """As if orbax or the memory below it had turned one number into another, all files being in order."""

    def other(values: dict[str, Any]) -> None:
        values["digests"][leaf] = leaf_digest(ARRAYS[leaf] + ARRAYS[leaf].dtype.type(1))

    shutil.copytree(saved / "20", tmp_path / "20")
    rewrite_progress(tmp_path / "20", other)
    with pytest.raises(CheckpointError, match=f"checkpoint 20 is damaged .{leaf} does not match its digest"):
        Checkpoints(tmp_path).load(20)


def test_a_damaged_latest_is_passed_over_and_removed(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "checkpoints")
    damage(tmp_path / "checkpoints/20" / PROGRESS, "flip", 0.5)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    loaded, complaints = checkpoints.load_latest()
    assert loaded is not None
    assert loaded.step == 10
    assert len(complaints) == 1
    assert complaints[0].startswith("checkpoint 20 is ")
    assert complaints[0].endswith("; going back to the one before it")
    assert checkpoints.steps() == [10]


def test_nothing_good_left(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "checkpoints")
    for step in (10, 20):
        shutil.rmtree(tmp_path / f"checkpoints/{step}" / STATE)
    loaded, complaints = Checkpoints(tmp_path / "checkpoints").load_latest()
    assert loaded is None
    assert len(complaints) == 2


def test_no_folder_is_no_checkpoint(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none").load_latest() == (None, [])
    with pytest.raises(CheckpointError, match="there is no checkpoint 3"):
        Checkpoints(tmp_path / "none").load(3)


@pytest.mark.parametrize(
    ("version", "words"), [(99, "newer than"), (0, "no longer reads"), (None, "no longer")]
)
def test_other_formats_are_refused_in_a_sentence(
    saved: Path, tmp_path: Path, version: Any, words: str
) -> None:
    shutil.copytree(saved, tmp_path / "checkpoints")
    rewrite_progress(tmp_path / "checkpoints/20", lambda values: values.update(format_version=version))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for read in (lambda: checkpoints.load(20), checkpoints.load_latest):
        with pytest.raises(UserError, match=f"has checkpoint format {version}.*{words}"):
            read()
    assert checkpoints.steps() == [10, 20]


@contextlib.contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> Iterator[None]:
    def fail(path: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(module, "sync_tree", fail)
        yield


def poll(checkpoints: Checkpoints) -> None:
    """What a training loop does after each step."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        checkpoints.check()
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(28, "No space left on device"), "the disk is full; free some space"),
        (ValueError("UNKNOWN: ... [OS error 28: ENOSPC No space left on device]"), "the disk is full"),
        (PermissionError(13, "Permission denied"), "the folder cannot be written to"),
        (OSError(30, "Read-only file system"), "the folder cannot be written to"),
        (OSError(27, "File too large"), "the largest size allowed here"),
        (OSError(5, "Input/output error"), "input/output error"),
        (RuntimeError("strange\nsecond line"), "strange; mend that"),
    ],
)
def test_a_failed_save_surfaces_once_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, advice: str
) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    with failing(monkeypatch, error):
        checkpoints.save(1, ARRAYS, {}, -1)
        with pytest.raises(UserError) as failure:
            poll(checkpoints)
    said = str(failure.value)
    assert said.startswith(f"Saving a checkpoint in {tmp_path / 'checkpoints'} failed: ")
    assert advice in said
    assert said.endswith(", then go on with --resume.")
    assert "\n" not in said
    checkpoints.check()
    checkpoints.close()
    assert checkpoints.steps() == []


@pytest.mark.parametrize("where", ["save", "wait", "close"])
def test_a_failed_save_surfaces_at_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    with failing(monkeypatch, OSError(28, "No space left on device")):
        checkpoints.save(1, ARRAYS, {}, -1)
        calls = {
            "save": lambda: checkpoints.save(2, ARRAYS, {}, -1),
            "wait": checkpoints.wait,
            "close": checkpoints.close,
        }
        with pytest.raises(UserError, match="disk is full"):
            calls[where]()
    checkpoints.save(3, ARRAYS, {}, -1)
    checkpoints.close()
    assert checkpoints.steps() == [3]


def test_a_failed_computation_is_not_called_a_failed_save(tmp_path: Path) -> None:
    class Lost:
        def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
            raise ConnectionError("Gloo all-reduce failed")

    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, {"a": Lost()}, {}, -1)
    with pytest.raises(ConnectionError, match="Gloo"):
        checkpoints.close()


def test_a_place_that_takes_no_folder(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(UserError, match=r"Saving a checkpoint in .* failed"):
        Checkpoints(tmp_path / "checkpoints").save(1, ARRAYS, {}, -1)


def test_digests_tell_type_shape_and_content_apart() -> None:
    arrays = [
        np.zeros(4, np.float32),
        np.zeros((2, 2), np.float32),
        np.zeros(4, np.int32),
        np.array([0, 0, 0, -0.0], np.float32),
        np.zeros(2, np.float64),
    ]
    assert len({leaf_digest(array) for array in arrays}) == len(arrays)
    assert leaf_digest(np.arange(6).reshape(2, 3).T) == leaf_digest(np.arange(6).reshape(2, 3).T.copy())


def test_the_latest_figures_can_be_read_without_arrays(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "checkpoints")
    (tmp_path / "checkpoints/20" / PROGRESS).write_text("{")
    assert Checkpoints(tmp_path / "checkpoints").latest_history() == PROGRESS_VALUES["history"]
    assert Checkpoints(tmp_path / "none").latest_history() == []
