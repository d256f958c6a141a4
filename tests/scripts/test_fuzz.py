"""The fuzzer finds what it is to find, and a short run over every parser finds nothing."""

from __future__ import annotations

import importlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/fuzz.py"


@pytest.fixture(scope="module")
def fuzz() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        yield importlib.import_module("fuzz")


@pytest.fixture(scope="module")
def make_target(fuzz: ModuleType) -> Callable[..., Any]:
    return importlib.import_module("fuzzing.targets").Target


def test_no_parser_falls_over_a_few_hundred_inputs(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", SCRIPT, "--count", "150", "--seconds", "200", "--findings"]
    done = subprocess.run([*command, tmp_path / "findings"], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("150 inputs, 0 kinds of findings") == 14
    assert not (tmp_path / "findings").exists()


def test_every_kind_of_failure_is_a_finding(
    fuzz: ModuleType, make_target: Callable[..., Any], tmp_path: Path
) -> None:
    def falls(content: bytes, folder: Path) -> None:
        if content == b"slow":
            time.sleep(5)
        if content == b"long":
            raise ValueError("a\nb\nc\nd")
        if content == b"large":
            raise MemoryError
        if content == b"wrong":
            raise IndexError("string index out of range")
        if content == b"refused":
            raise ValueError("no")

    target = make_target([b"x"], falls, (ValueError,))
    found = {
        name: fuzz.attempt(target, name.encode(), tmp_path, 0.05)
        for name in ("sound", "refused", "slow", "long", "large", "wrong")
    }
    assert found["sound"] == found["refused"] == ""
    assert found["slow"] == "more than 0.05 seconds"
    assert "several lines" in found["long"]
    assert found["large"] == "unbounded memory"
    assert found["wrong"].endswith("IndexError: string index out of range\n")


def test_what_falls_is_kept(
    fuzz: ModuleType,
    make_target: Callable[..., Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import argparse

    def falls(content: bytes, folder: Path) -> None:
        if len(content) >= 40:
            raise IndexError("too far")

    options = argparse.Namespace(seed=0, seconds=20.0, count=300, limit=1.0, findings=tmp_path / "findings")
    assert fuzz.fuzz("short", make_target([b"0" * 20], falls, ()), options) == 1
    (kept,) = (tmp_path / "findings").iterdir()
    assert len(kept.read_bytes()) >= 40
    assert str(kept) in capsys.readouterr().out
