"""Audit as a user runs it: without jax, as text and as a page that a browser shows."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from page_checks import look_at
from PIL import Image

from pcam_jax.audit import main
from pcam_jax.data.sample import write_sample_store
from pcam_jax.data.sample_sources import write_pcam_h5
from pcam_jax.data.store import open_store, write_store
from pcam_jax.runtime.errors import UserError

ROOT = Path(__file__).parents[1]
WITHOUT_JAX = """
import sys
from pcam_jax.audit import main
main(sys.argv[1:])
heavy = {"jax", "flax", "orbax", "torch"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """Forty patches of the sample with one blank, one twice and one turned."""
    folder = tmp_path_factory.mktemp("audited")
    clean = write_sample_store(folder / "clean", count=36, test_count=4, slides=6)
    pictures = clean.gather(np.arange(40))
    pictures[3] = 240
    pictures[5] = pictures[4]
    pictures[7] = np.rot90(pictures[6])
    return write_store(folder / "store", pictures, clean.index, clean.class_names)


def test_command_without_jax(sample, tmp_path):
    page = tmp_path / "audit.html"
    ids = tmp_path / "ids.csv"
    ids.write_text(f"id\n{bytes(sample.hashes()[0]).hex()}\n")
    command = [
        sys.executable,
        "-W",
        "error",
        "-c",
        WITHOUT_JAX,
        sample.path,
        "--output",
        page,
        "--against",
        ids,
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "PROBLEM" in done.stdout
    assert "Blank: 1 image" in done.stdout
    assert f"Wrote {page}." in done.stdout
    with open(tmp_path / "audit.leaks.csv", newline="") as file:
        (leak,) = csv.DictReader(file)
    assert (leak["id"], leak["equal"], leak["set"]) == (sample.ids[0], "to the byte", str(ids))
    measured = look_at(page)
    text = measured["text"]
    assert "Those that a model would learn from" in text
    for sentence in (
        "1 image of",
        "Images that repeat another one to the byte: 1.",
        "Images that repeat another one after turning or mirroring: 1.",
        "Blank: 1 image",
        sample.digest,
        "haematoxylin",
    ):
        assert sentence in text
    # 16 of each class, a bar chart, 6 histograms, a blank one, two sets of two
    assert measured["images"] == 2 * 16 + 1 + 6 + 1 + 2 + 2


def test_a_clean_store_beside_itself(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_sample_store(tmp_path / "clean", count=30, test_count=0, slides=6)
    main(["clean"])
    said = capsys.readouterr().out
    assert "PROBLEM" not in said
    assert "No group (slide or patient) has images in several splits." in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clean", "clean.audit.html"]


def test_a_config_shows_its_augmentation(sample, tmp_path, capsys):
    (tmp_path / "c.toml").write_text("[augment]\nd4 = true\n[data]\nvalidation_fraction = 0.5\n")
    main([str(sample.path), "--config", str(tmp_path / "c.toml"), "--output", str(tmp_path / "a.html")])
    said = capsys.readouterr().out
    counts = {
        line.split()[0]: line.split()[-2] for line in said.splitlines() if line.startswith(("train", "val"))
    }
    assert counts["validation"] == counts["train"]
    with Image.open(tmp_path / "a.augment.png") as sheet:
        assert sheet.width > sheet.height / 2 > 200
    assert "What augmentation does" in look_at(tmp_path / "a.html")["text"]


def test_a_run_is_audited_by_its_own_split(tiny_run, tmp_path, capsys):
    main([str(tiny_run), "--output", str(tmp_path / "run.html")])
    said = capsys.readouterr().out
    assert f"as the run {tiny_run} was trained" in said
    assert "with images in several splits" in said  # the tiny run is split by example


def test_slides_make_a_store_whose_split_keeps_them_apart(tmp_path, capsys):
    write_pcam_h5(tmp_path / "pcam")
    import h5py

    with h5py.File(tmp_path / "pcam/camelyonpatch_level_2_split_train_x.h5") as file:
        pictures = file["x"][:]
    import pandas as pd

    index = pd.DataFrame(
        {"id": [f"p{n}" for n in range(len(pictures))], "label": np.arange(len(pictures)) % 2}
    )
    write_store(tmp_path / "kaggle", pictures, index, ["normal", "tumour"])
    options = ["--meta", str(tmp_path / "pcam"), "--output", str(tmp_path / "a.html")]
    main([str(tmp_path / "kaggle"), *options, "--with-slides", str(tmp_path / "named")])
    said = capsys.readouterr().out
    assert f"names the slide of {len(pictures)} of {len(pictures)} images" in said
    assert "No group (slide or patient) has images in several splits." in said
    assert (open_store(tmp_path / "named").groups != "").all()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "There is no store at nowhere"),
        (["sample", "--with-slides", "x"], "--with-slides needs --meta"),
        (["sample", "--meta", "x", "--with-slides", "."], "exists already"),
        (["sample", "--output", "no/where/a.html"], "There is no folder no/where"),
    ],
)
def test_mistakes(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        main(arguments)
