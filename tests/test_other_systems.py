"""Raw files to evaluated and applied run, for data that is not PatchCamelyon's."""

from __future__ import annotations

import contextlib
import csv
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import picture_files as files
import pytest
import tiny

from pcam_jax.__main__ import dispatch
from pcam_jax.data.sample_sources import write_idc_tree, write_isic_folder
from pcam_jax.runtime.errors import UserError

ROOT = Path(__file__).parents[1]
QUICK = ["--train.epochs", 1, "--tracking.no-tensorboard"]


def run(verb: str, *arguments: object) -> str:
    """Run a verb, warnings as errors; returns what it prints."""
    command = [sys.executable, "-W", "error", "-m", f"pcam_jax.{verb}", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert done.returncode == 0, f"{verb}: {done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def here(verb: str, *arguments: object) -> str:
    """As `run`, in this process, which spares an import of jax."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        dispatch([verb, *map(str, arguments)])
    return said.getvalue()


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def groups_by_split(workdir: Path, store: Path) -> dict[str, set[str]]:
    groups = {row["id"]: row["group"] for row in rows(store / "index.csv")}
    found: dict[str, set[str]] = {}
    for row in rows(workdir / "split.csv"):
        found.setdefault(row["split"], set()).add(groups[row["id"]])
    return found


def test_idc_tiles(tmp_path: Path) -> None:
    source = write_idc_tree(tmp_path / "idc", patients=8, tiles=10)
    store, workdir = tmp_path / "store", tmp_path / "run"
    assert "images of 50x50" in run("prepare", source, store)
    said = run(
        "train", "configs/seeds/idc_cnn.toml", "--data.store", store, "--workdir", workdir, *QUICK,
        "--data.validation-fraction", 0.25, "--data.train-fraction", 0.75,
    )  # fmt: skip
    assert "2,513,642" in said
    # what comes next must work: these tiles have no test split
    assert "predict" in said.partition("Next:")[2]
    assert "--split test" not in said
    split = groups_by_split(workdir, store)
    assert len(split["train"]) + len(split["validation"]) == 8
    assert not split["train"] & split["validation"]
    assert "balanced accuracy" in here("evaluate", workdir, "--resamples", 100).lower()
    here("predict", workdir, source, "--split", "all", "--output", tmp_path / "out.csv")
    out = rows(tmp_path / "out.csv")
    assert [row["id"] for row in out] == sorted(path.stem for path in source.rglob("*.png"))
    here("predict", workdir, store, "--split", "all", "--output", tmp_path / "again.csv")
    assert rows(tmp_path / "again.csv") == out


def test_a_random_split_of_grouped_examples_is_warned_of(tmp_path: Path, train_tiny) -> None:
    said: list[str] = []
    options = {"train__epochs": 1, "say": said.append}
    train_tiny(tmp_path / "a", **options)  # the tiny store has six slides, its settings split by example
    assert "come from slides or patients that are also trained on" in "\n".join(said)
    said.clear()
    split = tmp_path / "a/split.csv"
    train_tiny(tmp_path / "b", data__split_file=str(split), **options)
    assert "overstate" in "\n".join(said)
    assert (tmp_path / "b/split.csv").read_text() == split.read_text()
    said.clear()
    train_tiny(tmp_path / "c", data__split_by="group", **options)
    assert "overstate" not in "\n".join(said)


def test_melanoma_photographs(tmp_path: Path) -> None:
    source = write_isic_folder(
        tmp_path / "isic", count=60, patients=15, malignant_share=0.25, width=150, test_count=4
    )
    store, workdir = tmp_path / "store", tmp_path / "run"
    assert "images of 64x64" in here("prepare", source, store, "--size", 64)
    recipe = [ROOT / "configs/seeds/melanoma_v1.toml", "--data.store", store, "--model.name", "melanoma_v1"]
    with pytest.raises(UserError, match="'melanoma_v1' cannot take 64x64 images"):
        here("train", *recipe, "--workdir", workdir)
    tiny.register()
    recipe[-1] = "tiny"
    said = here(
        "train",
        *recipe,
        "--model.options",
        "dropout",
        0.5,
        *QUICK,
        "--train.batch-size",
        8,
        "--workdir",
        workdir,
    )
    split = groups_by_split(workdir, store)
    assert not split["train"] & split["validation"]
    labels = {row["id"]: row["label"] for row in rows(store / "index.csv")}
    trained = [labels[row["id"]] for row in rows(workdir / "split.csv") if row["split"] == "train"]
    assert trained.count("0") == trained.count("1") > 0
    left = sum(row["split"] == "" for row in rows(workdir / "split.csv"))
    assert left > 0
    assert f"4 test, {left} left out" in said
    assert "--split test" in said
    assert "AUROC" in here("evaluate", workdir, "--resamples", 100)
    here("predict", workdir, source, "--output", tmp_path / "out.csv")
    assert [row["id"] for row in rows(tmp_path / "out.csv")] == [
        row["image_name"] for row in rows(source / "test.csv")
    ]


def test_three_classes_in_folders(tmp_path: Path) -> None:
    source = tmp_path / "pictures"
    for number in range(36):
        named = ("bird", "cat", "dog")[number % 3]
        path = source / named / f"p{number // 6}_{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        tint = np.zeros(3) + 60
        tint[number % 3] = 200
        noise = np.random.default_rng(number).normal(0, 20, (30, 40, 3))
        path.write_bytes(files.encoded(files.Image.fromarray(np.clip(tint + noise, 0, 255).astype(np.uint8))))
    store, workdir = tmp_path / "store", tmp_path / "run"
    said = here("prepare", source, store, "--size", 32, "--group-pattern", r"(p\d)_")
    assert "12 bird, 12 cat, 12 dog" in said
    tiny.register()
    settings = ["--data.store", store, "--model.name", "tiny", "--model.head", "softmax", *QUICK]
    here("train", *settings, "--train.batch-size", 8, "--workdir", workdir)
    assert not set.intersection(*groups_by_split(workdir, store).values())
    assert "macro" in here("evaluate", workdir, "--resamples", 100).lower()
    here("predict", workdir, source, "--output", tmp_path / "out.csv")
    out = rows(tmp_path / "out.csv")
    assert list(out[0]) == ["id", "bird", "cat", "dog"]
    assert len(out) == 36
    assert all(abs(sum(float(row[name]) for name in list(row)[1:]) - 1) < 1e-5 for row in out)


@pytest.mark.parametrize("size", [50, 500])
def test_networks_take_any_size(size: int) -> None:
    from pcam_jax.models.registry import build_model

    for name in ("resnet_small", "pcam_model4"):
        assert build_model(name, image_shape=(size, size, 3), outputs=3).summary()[-1].output_shape == (3,)
