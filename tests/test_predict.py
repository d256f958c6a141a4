"""Predicting from the outside, and the checks a submission must pass."""

from __future__ import annotations

import csv
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pcam_jax.data.store import open_store
from pcam_jax.inference.predictor import Predictor
from pcam_jax.predict import in_order_of, main, read_submission_ids, write_submission
from pcam_jax.runtime.errors import UserError

Verb = Callable[..., subprocess.CompletedProcess[str]]


def table(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype={"id": str})


@pytest.fixture
def sample(tiny_store: Path, tmp_path: Path) -> Path:
    """A sample submission of the test images, in an order of its own."""
    store = open_store(tiny_store)
    ids = store.ids[store.splits == "test"][::-1]
    path = tmp_path / "sample_submission.csv"
    pd.DataFrame({"id": ids, "label": 0}).to_csv(path, index=False)
    return path


def test_a_submission_from_the_command_line(
    verb: Verb, tiny_run: Path, tiny_store: Path, sample: Path, tmp_path: Path
) -> None:
    output = tmp_path / "submission.csv"
    done = verb("predict", tiny_run, tiny_store, "--output", output, "--sample-submission", sample)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "14 predictions in" in done.stdout
    assert "are called class1 (at 0.5); in training" in done.stdout
    assert f"Wrote {output}." in done.stdout
    found = table(output)
    assert list(found) == ["id", "label"]
    assert found["id"].tolist() == table(sample)["id"].tolist()
    store = open_store(tiny_store)
    positions = np.array([np.flatnonzero(store.ids == name)[0] for name in found["id"]])
    expected = Predictor.load(tiny_run).predict(store, positions)
    # nine digits hold every float32 exactly
    np.testing.assert_array_equal(found["label"].to_numpy(np.float32), expected)


def test_the_same_input_gives_the_same_bytes(tiny_run: Path, tiny_store: Path, tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv"):
        main([str(tiny_run), str(tiny_store), "--output", str(tmp_path / name), "--tta", "d4"])
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def test_images_in_a_folder_and_one_alone(
    tiny_run: Path, tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = open_store(tiny_store).gather(np.arange(3))
    (tmp_path / "images").mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"images/p{number}.png")
    main([str(tiny_run), str(tmp_path / "images"), "--output", str(tmp_path / "folder.csv")])
    main([str(tiny_run), str(tmp_path / "images/p1.png"), "--output", str(tmp_path / "one.csv")])
    folder, one = table(tmp_path / "folder.csv"), table(tmp_path / "one.csv")
    assert folder["id"].tolist() == ["p0", "p1", "p2"]
    np.testing.assert_array_equal(folder["label"].to_numpy(np.float32), Predictor.load(tiny_run)(images))
    assert one.values.tolist() == folder.iloc[1:2].values.tolist()
    assert "1 predictions" in capsys.readouterr().out


def test_several_runs_give_their_mean(
    tiny_run: Path, tiny_store: Path, tmp_path: Path, train_tiny: Callable[..., object]
) -> None:
    train_tiny(tmp_path / "other", train__seed=1, train__epochs=1)
    for name, runs in (
        ("a", [tiny_run]),
        ("b", [tmp_path / "other"]),
        ("ab", [tiny_run, tmp_path / "other"]),
    ):
        main([*map(str, runs), str(tiny_store), "--output", str(tmp_path / f"{name}.csv")])
    a, b, ab = (table(tmp_path / f"{name}.csv")["label"].to_numpy() for name in ("a", "b", "ab"))
    np.testing.assert_allclose(ab, (a + b) / 2, rtol=1e-6)


def test_a_damaged_checkpoint_is_a_warning(
    tiny_run: Path, tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pcam_jax.run.folder import open_run

    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    best = open_run(run).best_checkpoint()[0].step
    (run / f"checkpoints/{best}/progress.json").write_text("")
    main([str(run), str(tiny_store), "--output", str(tmp_path / "out.csv")])
    assert f"Warning: checkpoint {best} is unreadable" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{run}", "--output", "{out}"], "Give one or more runs and then an input"),
        (["{run}", "{store}", "--output", "{out}", "--tta", "d8"], "--tta is 'd8'"),
        (["{run}", "{store}", "--output", "{tmp}/none/out.csv"], "There is no folder"),
        (["{run}", "{tmp}/none", "--output", "{out}"], "There is no .*none: give a store"),
        (["{tmp}/none", "{store}", "--output", "{out}"], "There is no run"),
        (["{store}", "{store}", "--output", "{out}"], "is not a run made by"),
        (["{run}", "{store}", "--output", "{out}", "--split", "holdout"], "has no split 'holdout'"),
        (
            ["{run}", "{store}", "--output", "{out}", "--sample-submission", "{tmp}/none.csv"],
            "no sample submission",
        ),
    ],
)
def test_mistakes_are_said_and_nothing_is_written(
    tiny_run: Path, tiny_store: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    places = {"run": tiny_run, "store": tiny_store, "tmp": tmp_path, "out": tmp_path / "out.csv"}
    with pytest.raises(UserError, match=words):
        main([argument.format(**places) for argument in arguments])
    assert not (tmp_path / "out.csv").exists()


def test_images_of_another_size_are_refused(tiny_run: Path, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "p.png")
    with pytest.raises(UserError, match=r"p cannot be used: .*9x9 instead of 12x12"):
        main([str(tiny_run), str(tmp_path / "p.png"), "--output", str(tmp_path / "out.csv")])


def test_a_sample_submission_that_does_not_fit_names_both_sides(
    tiny_run: Path, tiny_store: Path, sample: Path, tmp_path: Path
) -> None:
    rows = table(sample)
    rows.loc[0, "id"] = "stranger"
    rows.to_csv(sample, index=False)
    arguments = [str(tiny_run), str(tiny_store), "--output", str(tmp_path / "out.csv")]
    with pytest.raises(
        UserError, match=r"1 of its ids have no prediction \(first stranger\); 1 predictions are not"
    ):
        main([*arguments, "--sample-submission", str(sample)])
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("id,label\na,0\nb,0\na,0\n", "repeats 1 ids, the first a"),
        ("name,label\na,0\n", "has no column 'id': it has name, label"),
        ("", "is not a CSV table"),
    ],
)
def test_a_sample_submission_with_mistakes(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "sample.csv").write_text(content)
    with pytest.raises(UserError, match=words):
        read_submission_ids(tmp_path / "sample.csv")


def test_ids_stay_text(tmp_path: Path) -> None:
    (tmp_path / "sample.csv").write_text("id,label\n0012,0\n1e5,0\nNA,0\n")
    assert read_submission_ids(tmp_path / "sample.csv").tolist() == ["0012", "1e5", "NA"]


@pytest.mark.parametrize(
    ("ids", "probs", "words"),
    [
        (["a", "b"], [0.5], "2 ids, 1 probabilities"),
        ([], [], "no ids"),
        (["a", "b", "a"], [0.5, 0.5, 0.5], "1 ids occur more than once in the submission: a"),
        (["a", ""], [0.5, 0.5], "Row 2 of the submission has no id"),
        (["a", "b\r"], [0.5, 0.5], r"1 ids hold unprintable characters, the first 'b\\r'"),
        (["a", "b"], [0.5, np.nan], r"1 predictions are not probabilities, the first for b \(\[nan\]\)"),
        (["a", "b"], [1.5, -0.1], "2 predictions are not probabilities, the first for a"),
        (["a"], [[0.5, np.inf]], "1 predictions are not probabilities"),
    ],
)
def test_a_bad_submission_is_refused_and_the_old_file_stays(
    tmp_path: Path, ids: list[str], probs: list[float], words: str
) -> None:
    path = tmp_path / "out.csv"
    path.write_text("old")
    with pytest.raises(UserError, match=words):
        write_submission(path, ids, np.array(probs, np.float64))
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.csv"]


@settings(max_examples=30)
@given(st.dictionaries(st.text(min_size=1), st.floats(0, 1, width=32), min_size=1))
def test_what_is_written_comes_back(tmp_path_factory: pytest.TempPathFactory, rows: dict[str, float]) -> None:
    path = tmp_path_factory.mktemp("submission") / "out.csv"
    names = [name for name in rows if name.isprintable()]
    if not names:
        return
    write_submission(path, names, np.array([rows[name] for name in names], np.float32))
    with open(path, newline="", encoding="utf-8") as file:
        written = list(csv.reader(file))
    assert written[0] == ["id", "label"]
    assert [name for name, _ in written[1:]] == names
    assert [np.float32(value) for _, value in written[1:]] == [np.float32(rows[name]) for name in names]


def test_several_classes_have_a_column_each(tmp_path: Path) -> None:
    write_submission(tmp_path / "out.csv", ["a"], np.array([[0.25, 0.75, 0.0]]), class_names=["x", "y", "z"])
    assert (tmp_path / "out.csv").read_text() == "id,x,y,z\na,0.25,0.75,0\n"


@given(st.permutations(range(6)))
def test_predictions_follow_the_wanted_order(order: list[int]) -> None:
    wanted = np.array([f"p{number}" for number in order])
    ids, probs = in_order_of(wanted, np.array([f"p{n}" for n in range(6)]), np.arange(6) / 10, None)
    assert ids.tolist() == wanted.tolist()
    assert probs.tolist() == [number / 10 for number in order]


def test_three_classes_are_written_and_described(
    tmp_path: Path, train_tiny: Callable[..., object], capsys: pytest.CaptureFixture[str]
) -> None:
    store = tiny.make_tiny_store(tmp_path / "store", classes=3)
    train_tiny(tmp_path / "run", store=store, model__head="softmax", train__epochs=1)
    main([str(tmp_path / "run"), str(store), "--output", str(tmp_path / "out.csv")])
    found = table(tmp_path / "out.csv")
    assert list(found) == ["id", "class0", "class1", "class2"]
    np.testing.assert_allclose(found.iloc[:, 1:].sum(axis=1), 1, rtol=1e-6)
    assert "class2: " in capsys.readouterr().out
