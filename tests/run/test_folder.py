from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny

from pcam_jax.data.split import assign_splits
from pcam_jax.data.store import open_store
from pcam_jax.run.folder import CONFIG, HISTORY, open_run
from pcam_jax.run.history import read_history
from pcam_jax.runtime.errors import UserError


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def test_a_run_knows_what_made_it(tiny_run: Path, tiny_store: Path) -> None:
    run, store = open_run(tiny_run), open_store(tiny_store)
    assert run.config.model.name == "tiny"
    assert run.class_names == store.class_names
    assert run.image_shape == store.image_shape
    assert run.environment["data"]["digest"] == store.digest
    assert {"jax", "flax", "optax", "orbax-checkpoint"} <= set(run.environment["packages"])
    assert run.environment["command"].startswith("python -m pcam_jax.train")
    assert run.result is not None
    assert run.result["ended_by"] == "epochs"
    split = assign_splits(store.index, run.config.data)
    assert run.split()["split"].to_numpy().tolist() == split.tolist()
    assert run.split()["id"].tolist() == store.ids.tolist()
    for name in ("train", "validation"):
        np.testing.assert_array_equal(run.positions(store, name), np.flatnonzero(split == name))
        counted = run.environment["data"]["examples_by_class"][name]
        assert counted == np.bincount(store.labels[split == name]).tolist()


def test_ids_are_found_in_another_order(tiny_run: Path, tiny_store: Path, tmp_path: Path) -> None:
    from pcam_jax.data.store import write_store

    run, store = open_run(tiny_run), open_store(tiny_store)
    order = np.random.default_rng(0).permutation(len(store))
    moved = write_store(
        tmp_path / "moved",
        store.gather(order),
        store.index.iloc[order].reset_index(drop=True),
        store.class_names,
    )
    here, there = run.positions(store, "validation"), run.positions(moved, "validation")
    np.testing.assert_array_equal(store.ids[here], moved.ids[there])
    fewer = np.flatnonzero(store.ids != store.ids[here[1]])
    rest = write_store(
        tmp_path / "rest",
        store.gather(fewer),
        store.index.iloc[fewer].reset_index(drop=True),
        store.class_names,
    )
    with pytest.raises(UserError, match=rf"lacks 1 of the validation examples .*{store.ids[here[1]]} first"):
        run.positions(rest, "validation")


def test_an_empty_split_is_said_to_be(tiny_run: Path, tiny_store: Path) -> None:
    with pytest.raises(UserError, match="has no examples in the split 'holdout'"):
        open_run(tiny_run).positions(open_store(tiny_store), "holdout")


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"There is no run .*none: make one"):
        open_run(tmp_path / "none")
    with pytest.raises(UserError, match=r"is not a run made by .*: it has no config.toml"):
        open_run(tmp_path)


def test_a_run_without_checkpoint_has_no_best(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="has no checkpoint yet"):
        open_run(run).best_checkpoint()


def test_the_best_is_the_one_the_run_named(tiny_run: Path) -> None:
    run = open_run(tiny_run)
    checkpoint, remarks = run.best_checkpoint()
    assert run.result is not None
    assert checkpoint.step == run.result["best_step"]
    rows = run.history()
    losses = [row["validation_loss"] for row in rows]
    assert checkpoint.step == rows[int(np.argmin(losses))]["step"]
    assert remarks == []


def test_ties_go_to_the_earlier_epoch(tmp_path: Path, train_tiny: Callable[..., object]) -> None:
    # a rate of almost nothing leaves every epoch with the same figures
    train_tiny(tmp_path / "run", optimizer__peak_lr=1e-30, optimizer__schedule="constant", train__epochs=2)
    run = open_run(tmp_path / "run")
    assert run.result is not None
    assert run.best_checkpoint()[0].step == run.result["best_step"] == run.history()[0]["step"]


def test_a_damaged_best_gives_way_with_a_word(run: Path) -> None:
    opened = open_run(run)
    best = opened.best_checkpoint()[0].step
    (run / f"checkpoints/{best}/progress.json").write_text("{")
    checkpoint, remarks = opened.best_checkpoint()
    assert checkpoint.step != best
    assert len(remarks) == 1
    assert remarks[0].startswith(f"checkpoint {best} is unreadable")
    assert remarks[0].endswith("; using another")
    for path in (run / "checkpoints").glob("*/progress.json"):
        path.write_text("{")
    with pytest.raises(UserError, match=r"No checkpoint of .* can be read"):
        opened.best_checkpoint()


@pytest.mark.parametrize(
    "content", ["", "epoch,step\n1,2\n", "epoch,step,validation_loss\n1,nan,0.1\n", "a\0b\nc"]
)
def test_a_damaged_history_does_not_hide_the_best(run: Path, content: str) -> None:
    best = open_run(run).best_checkpoint()[0].step
    (run / HISTORY).write_text(content)
    checkpoint, remarks = open_run(run).best_checkpoint()
    assert checkpoint.step == best
    if content:
        assert any(
            "history.csv is damaged; using the figures in the checkpoints" in remark for remark in remarks
        )


@pytest.mark.parametrize("name", ["environment.json", "result.json"])
def test_damaged_json_is_said_to_be(run: Path, name: str) -> None:
    (run / name).write_text("{")
    with pytest.raises(UserError, match=f"{name} is not valid JSON"):
        print(getattr(open_run(run), name.removesuffix(".json")))


def test_a_damaged_config_is_said_to_be(run: Path) -> None:
    (run / CONFIG).write_text("[train\n")
    with pytest.raises(UserError, match="is not valid TOML"):
        print(open_run(run).config)


def test_history_has_a_line_an_epoch(tiny_run: Path) -> None:
    rows = read_history(tiny_run / HISTORY)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    with open(tiny_run / HISTORY, newline="") as file:
        assert set(tiny.FIGURES_OF_TIME) < set(next(csv.reader(file)))


def test_a_moved_run_works(run: Path) -> None:
    moved = run.rename(run.parent / "elsewhere")
    assert open_run(moved).best_checkpoint()[0].arrays
    assert json.loads((moved / "result.json").read_text())["epochs"] == 3
