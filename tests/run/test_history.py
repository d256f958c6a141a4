from __future__ import annotations

import contextlib
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pcam_jax.run.history import read_history, write_history
from pcam_jax.runtime.errors import UserError

FIGURES = st.builds(
    lambda epoch, loss, auroc: {"epoch": epoch, "loss": loss, "auroc": auroc},
    st.integers(0, 10**6),
    st.floats() | st.just(-0.0),
    st.floats(0, 1, width=32),
)


@settings(max_examples=40)
@given(st.lists(FIGURES, max_size=5))
def test_figures_come_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, float]]
) -> None:
    path = tmp_path_factory.mktemp("history") / "history.csv"
    write_history(path, rows)
    back = read_history(path)
    assert [list(row) for row in back] == [list(row) for row in rows]
    for found, expected in zip(back, rows, strict=True):
        for name, value in expected.items():
            assert found[name] == value or (math.isnan(found[name]) and math.isnan(value))
            assert math.copysign(1, found[name]) == math.copysign(1, value) or math.isnan(value)


def test_no_file_is_an_empty_history(tmp_path: Path) -> None:
    assert read_history(tmp_path / "history.csv") == []


def test_whole_numbers_have_no_point(tmp_path: Path) -> None:
    write_history(tmp_path / "history.csv", [{"epoch": 1, "step": 2.0, "loss": 0.5, "nothing": float("nan")}])
    assert (tmp_path / "history.csv").read_text() == "epoch,step,loss,nothing\n1,2,0.5,nan\n"


@settings(max_examples=40)
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_whatever_the_file_holds_it_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("history") / "history.csv"
    path.write_bytes(content)
    rows: list[dict[str, float]] = []
    with contextlib.suppress(UserError):
        rows = read_history(path)
    assert all(isinstance(value, float) for row in rows for value in row.values())
