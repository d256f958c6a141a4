"""The reader of SIIM-ISIC photographs: what it finds, and what it says of broken sources."""

import csv
import shutil
from pathlib import Path

import numpy as np
import picture_files as files
import pytest
from picture_sources import prepare, problems

from pcam_jax.data.sample_sources import write_isic_folder
from pcam_jax.runtime.errors import UserError


@pytest.fixture
def source(tmp_path) -> Path:
    return write_isic_folder(tmp_path / "isic", count=12, patients=4, width=160, test_count=2)


def test_patients_metadata_and_test_split(source, tmp_path):
    store, told = prepare(source, tmp_path, size=40)
    assert told == []
    assert store.image_shape == (40, 40, 3)
    table = list(csv.DictReader((source / "train.csv").read_text().splitlines()))
    assert list(store.ids)[:12] == [row["image_name"] for row in table]
    assert list(store.labels) == [int(row["target"]) for row in table] + [-1, -1]
    assert list(store.groups)[:12] == [row["patient_id"] for row in table]
    assert list(store.index["diagnosis"])[:12] == [row["diagnosis"] for row in table]
    assert list(store.splits) == [""] * 12 + ["test"] * 2
    assert set(store.groups[:12]) & set(store.groups[12:]) == set()


def test_500_by_default_and_the_same_by_workers(source, tmp_path):
    alone, _ = prepare(source, tmp_path / "a")
    shared, _ = prepare(source, tmp_path / "b", workers=2, images_per_shard=5)
    assert alone.image_shape == (500, 500, 3)
    assert np.array_equal(alone.hashes(), shared.hashes())


def test_broken_sources_are_named(source, tmp_path):
    photos = sorted((source / "jpeg/train").iterdir())
    photos[0].write_bytes(photos[0].read_bytes()[:300])
    photos[1].unlink()
    photos[2].rename(photos[2].with_name("ISIC_0000001.jpg"))
    shutil.copy(photos[3], source / photos[3].name)
    photos[4].write_bytes(b"<html>log in")
    photos[5].write_bytes(files.turned_jpeg(6))
    rows = (source / "train.csv").read_text().splitlines()
    rows[7] = rows[7][:-1] + "2"
    rows.append(rows[8])
    (source / "train.csv").write_text("\n".join(rows))
    with pytest.raises(UserError) as error:
        prepare(source, tmp_path, size=40)
    assert "\n" not in str(error.value)
    found = sorted(problems(tmp_path))
    names = [photo.stem for photo in photos]
    assert found == sorted([
        ("unreadable", names[0]), ("label without image", names[1]), ("label without image", names[2]),
        ("image without label", "ISIC_0000001"), ("duplicate id", names[3]), ("unreadable", names[4]),
        ("bad label", names[6]), ("duplicate id", names[7]),
    ])  # fmt: skip
    store, told = prepare(source, tmp_path, size=40, on_error="skip")
    assert "1 x turned as its EXIF says" in told[-1]
    assert len(store) == 14 - 5


def test_without_a_table_of_targets(source, tmp_path):
    (source / "train.csv").unlink()
    with pytest.raises(UserError, match="no table with the columns image_name, patient_id and target"):
        prepare(source, tmp_path)
