from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pcam_jax.data.store import open_store, write_store
from pcam_jax.inference.parts import Parts, parse_shard
from pcam_jax.inference.predictor import Predictor
from pcam_jax.predict import main
from pcam_jax.runtime.errors import UserError

Verb = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def many(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 300 images: three batches."""
    store = open_store(tiny_store)
    rows = np.resize(np.arange(len(store)), 300)
    index = store.index.iloc[rows].assign(id=[f"p{n}" for n in range(300)], split="test", label=-1)
    path = tmp_path_factory.mktemp("many") / "store"
    write_store(path, store.gather(rows), index.reset_index(drop=True), store.class_names)
    return path


def predict(run: Path, store: Path, output: Path, *extra: str) -> None:
    main([str(run), str(store), "--output", str(output), *extra])


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (2, 0, 1), (3, 1, 4, 0, 2)])
def test_parts_make_the_same_bytes_in_any_order(
    tiny_run: Path, many: Path, tmp_path: Path, order: tuple[int, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    predict(tiny_run, many, tmp_path / "whole.csv", "--tta", "d4")
    output = tmp_path / "parts.csv"
    for number, part in enumerate(order, start=1):
        assert not output.exists()
        predict(tiny_run, many, output, "--tta", "d4", "--shard", f"{part}/{len(order)}")
        said = capsys.readouterr().out
        waiting = sorted(set(order) - set(order[:number]))
        if waiting:
            assert f"not yet: {', '.join(f'{left}/{len(order)}' for left in waiting)}." in said
    assert f"Wrote {output}." in said
    assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["parts.csv", "whole.csv"]


def test_parts_of_other_weights_are_made_again(
    tiny_run: Path, many: Path, tmp_path: Path, train_tiny: Callable[..., object]
) -> None:
    train_tiny(tmp_path / "other", train__seed=1, train__epochs=1)
    output = tmp_path / "out.csv"
    predict(tmp_path / "other", many, output, "--shard", "0/2")
    predict(tiny_run, many, output, "--shard", "1/2")
    assert not output.exists()
    predict(tiny_run, many, output, "--shard", "0/2")
    predict(tiny_run, many, tmp_path / "whole.csv")
    assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_a_part_that_is_there_is_not_made_again_and_a_damaged_one_is(
    tiny_run: Path, many: Path, tmp_path: Path
) -> None:
    store = open_store(many)
    made: list[slice] = []
    predictor = Predictor.load(tiny_run)
    parts = Parts(tmp_path / "out.csv", [predictor], store.ids, 2)

    def compute(rows: slice) -> np.ndarray:
        made.append(rows)
        return np.zeros(rows.stop - rows.start, np.float32)

    for _ in range(2):
        parts.make(0, compute)
    assert made == [slice(0, 128)]
    path = parts.folder / "0-of-2.npz"
    path.write_bytes(path.read_bytes()[:-30])
    assert parts.missing() == [0, 1]
    parts.make(0, compute)
    assert len(made) == 2
    assert parts.missing() == [1]


def test_what_cannot_be_put_together_is_said_at_once(tiny_run: Path, many: Path, tmp_path: Path) -> None:
    (tmp_path / "sample.csv").write_text("id,label\nstranger,0\n")
    extra = ["--sample-submission", str(tmp_path / "sample.csv"), "--shard"]
    predict(tiny_run, many, tmp_path / "out.csv", *extra, "0/2")
    with pytest.raises(UserError, match="do not fit"):
        predict(tiny_run, many, tmp_path / "out.csv", *extra, "1/2")


@pytest.mark.parametrize("text", ["", "1", "2/2", "-1/2", "a/b", "1/2/3", "0/0"])
def test_what_is_no_part_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="must be I/N with I from 0 to N-1"):
        parse_shard(text)
