"""SIGKILL for real, again and again: the short form of ``python scripts/crash_test.py``."""

from __future__ import annotations

import importlib
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def crash_test() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        yield importlib.import_module("crash_test")


def test_a_killed_run_goes_on_until_it_equals_one_that_was_not(
    crash_test: ModuleType,
    train_tiny: Callable[..., Any],
    tiny_store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    long: bool,
) -> None:
    # a killed process may leave half a program behind: not in the cache that the other tests share
    shutil.copytree(os.environ["JAX_COMPILATION_CACHE_DIR"], tmp_path / "xla")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    settings = {
        "train__epochs": 400 if long else 30,
        "checkpoint__every_steps": 3,
        "augment__horizontal_flip": True,
        "optimizer__ema_decay": 0.99,
    }
    straight = train_tiny(tmp_path / "straight", **settings).path
    run = tmp_path / "run"

    def command(resume: bool) -> list[Any]:
        options = tiny.as_options(tiny.settings(tiny_store, **settings))
        begin = [sys.executable, "-W", "error", ROOT / "tests/tiny.py", "train", "--workdir", run, *options]
        return [*begin, *(["--resume"] if resume else [])]

    faults = crash_test.make_faults(random.Random(0))
    if not long:
        wanted = ("when a save begins", "before the rename", "while an old one is removed")
        faults = [fault for fault in faults if fault.name.endswith(wanted)]
    lives = crash_test.kill_until_done(command, run, 42, 8, faults, 20 if long else 3)
    assert len(lives) >= 3
    # every life went on from the one before, and saved more
    saved = [life.saved_step for life in lives]
    assert saved == sorted(set(saved))
    assert saved[0] > 0
    for before, life in zip([0, *saved], lives, strict=False):
        assert life.first_step > before
        assert life.last_step >= life.first_step
    assert crash_test.differences(straight, run) == []
    assert "lost steps" in crash_test.table(lives)


def test_differences_are_found(
    crash_test: ModuleType, train_tiny: Callable[..., Any], tiny_run: Path, tmp_path: Path
) -> None:
    other = train_tiny(tmp_path / "other", train__seed=5).path
    found = crash_test.differences(tiny_run, other)
    assert "history.csv" in found
    assert "params.output.kernel" in found
    assert crash_test.differences(tiny_run, tiny_run) == []
