import gzip
import hashlib
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from pcam_jax.data.convert import prepare_store
from pcam_jax.data.raw import find_reader
from pcam_jax.data.sample_sources import PcamH5Counts, write_pcam_h5
from pcam_jax.data.store import Store
from pcam_jax.runtime.errors import UserError

h5py = pytest.importorskip("h5py")
COUNTS = PcamH5Counts(train=140, valid=6, test=5, slides=3)
STEM = "camelyonpatch_level_2_split_"


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return write_pcam_h5(tmp_path_factory.mktemp("pcam") / "h5", COUNTS, size=24, duplicates=3)


@pytest.fixture
def source(original, tmp_path) -> Path:
    shutil.copytree(original, tmp_path / "h5")
    return tmp_path / "h5"


def assert_holds(store: Store, source: Path) -> None:
    assert list(store.splits) == ["train"] * 140 + ["validation"] * 6 + ["test"] * 5
    images = [
        np.asarray(h5py.File(source / f"{STEM}{split}_x.h5")["x"]) for split in ("train", "valid", "test")
    ]
    assert np.array_equal(store.gather(range(len(store))), np.concatenate(images))
    assert list(store.ids) == [hashlib.sha1(image.tobytes()).hexdigest() for image in np.concatenate(images)]


def test_slides_are_groups_and_ids_are_kaggles(source, tmp_path):
    told: list[str] = []
    store = prepare_store(source, tmp_path / "store", notify=told.append)
    assert told == []
    assert_holds(store, source)
    assert store.class_names == ("normal", "tumour")
    assert store.groups[0] == "camelyon16_train_000"
    assert len(set(store.groups)) == 9
    assert len(set(store.ids)) == 151 - 3  # the duplicates have equal ids
    labels = np.asarray(h5py.File(source / f"{STEM}valid_y.h5")["y"]).reshape(-1)
    assert np.array_equal(store.labels[140:146], labels)


@pytest.mark.parametrize("kind", ["gz", "zip", "tar", "zip of gz"])
def test_compressed_files_are_read_from_temporary_copies(source, tmp_path, kind, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    packed = tmp_path / "packed"
    packed.mkdir()
    for path in source.iterdir():
        if "gz" in kind:
            (packed / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), 1))
        else:
            shutil.copy(path, packed)
    given = packed
    if "zip" in kind:
        given = tmp_path / "packed.zip"
        with zipfile.ZipFile(given, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in packed.iterdir():
                archive.write(path, f"inner/{path.name}")
    elif kind == "tar":
        given = tmp_path / "packed.tar"
        with tarfile.open(given, "w") as archive:
            archive.add(packed, "inner")
    store = prepare_store(given, tmp_path / "store", workers=2, images_per_shard=60)
    assert_holds(store, source)
    assert store.groups[0] == "camelyon16_train_000"
    assert list(temporary.iterdir()) == []


def test_one_file_stands_for_its_folder(source, tmp_path):
    assert_holds(prepare_store(source / f"{STEM}train_x.h5", tmp_path / "store"), source)


def test_missing_parts_are_said(source, tmp_path):
    for name in ("train_meta.csv", "valid_y.h5", "test_x.h5"):
        (source / f"{STEM}{name}").unlink()
    told: list[str] = []
    store = prepare_store(source, tmp_path / "store", notify=told.append)
    assert told == [
        "There is no train_meta.csv: its patches name no slide.",
        "There is no valid_y.h5: its patches are without label.",
        "There is no test_x.h5: this split is left aside.",
    ]
    assert set(store.splits) == {"train", "validation"}
    assert set(store.labels[140:]) == {-1}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("train_x.h5", lambda old: old[: len(old) // 2], "train_x.h5 is cut short"),
        ("train_x.h5", lambda old: b"<!DOCTYPE html><html>", r"web page \(HTML\)"),
        ("train_x.h5", lambda old: b"", "is empty"),
        ("train_x.h5", lambda old: b"nonsense" * 99, "no readable HDF5 file"),
        ("train_meta.csv", lambda old: b"a,b\n1,2\n", "no column 'wsi'"),
        ("train_meta.csv", lambda old: old[:500], "rows for 140 patches"),
    ],
)
def test_damaged_files_are_said_in_a_sentence(source, tmp_path, name, content, said):
    path = source / f"{STEM}{name}"
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(UserError, match=said):
        prepare_store(source, tmp_path / "store")


def test_damaged_gz(source, tmp_path):
    path = source / f"{STEM}train_x.h5"
    packed = gzip.compress(path.read_bytes(), 1)
    path.unlink()
    for content, said in ((packed[: len(packed) // 2], "damaged or incomplete"), (b"<html>", "web page")):
        Path(f"{path}.gz").write_bytes(content)
        with pytest.raises(UserError, match=said):
            prepare_store(source, tmp_path / "store")


def test_files_that_disagree(source, tmp_path):
    with h5py.File(source / f"{STEM}train_y.h5", "w") as file:
        file["y"] = np.zeros(5, np.uint8)
    with pytest.raises(UserError, match="5 labels for 140 patches"):
        prepare_store(source, tmp_path / "store")
    with h5py.File(source / f"{STEM}train_x.h5", "w") as file:
        file["x"] = np.zeros((5, 24, 24), np.uint8)
    with pytest.raises(UserError, match=r"holds uint8 \(5, 24, 24\)"):
        prepare_store(source, tmp_path / "store")
    with h5py.File(source / f"{STEM}train_x.h5", "w") as file:
        file["images"] = np.zeros((5, 24, 24, 3), np.uint8)
    with pytest.raises(UserError, match="no dataset 'x'"):
        find_reader(source).records()
