"""The audit names what was planted, and stays silent where nothing is wrong."""

import numpy as np
import pandas as pd
import pytest

from pcam_jax.data.audit import audit_store, sample_by_class
from pcam_jax.data.integrity import verify_store
from pcam_jax.data.leaks import read_hashes
from pcam_jax.data.manifest import sha1_of
from pcam_jax.data.sample_sources import write_pcam_h5
from pcam_jax.data.slides import slides_by_hash, slides_of, write_store_with_slides
from pcam_jax.data.store import open_store, write_store
from pcam_jax.runtime.errors import UserError


def pictures_of(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 12, 12, 3), dtype=np.uint8)


def make_store(path, pictures, **columns):
    ids = [sha1_of(image).hex() for image in pictures]
    rows = {"id": ids, "label": np.arange(len(pictures)) % 2, **columns}
    return write_store(path, pictures, pd.DataFrame(rows), ["normal", "tumour"])


def splits_of(*parts):
    return np.repeat([name for name, _ in parts], [count for _, count in parts])


TRAIN_VALIDATION = splits_of(("train", 6), ("validation", 4))


def sentences(audit, level):
    return " ".join(finding.sentence for finding in audit.findings if finding.level == level)


def test_a_clean_store_has_no_problem(tmp_path):
    groups = ["a"] * 6 + ["b"] * 4
    store = make_store(tmp_path / "store", pictures_of(10), group=groups)
    audit = audit_store(store, TRAIN_VALIDATION, "given")
    assert sentences(audit, "problem") == ""
    assert sentences(audit, "note") == ""
    assert [(row.split, row.by_class, row.count, row.groups) for row in audit.split_rows] == [
        ("train", (3, 3), 6, 1),
        ("validation", (2, 2), 4, 1),
    ]


def test_planted_faults_are_named(tmp_path):
    pictures = pictures_of(10)
    pictures[7] = pictures[0]  # across splits, of another label
    pictures[2] = np.rot90(pictures[4])  # within train, turned
    pictures[5] = 200  # blank
    groups = ["a", "b", "c", "a", "b", "c", "d", "e", "a", ""]
    store = make_store(tmp_path / "store", pictures, group=groups)
    audit = audit_store(store, TRAIN_VALIDATION, "given")
    problems = sentences(audit, "problem")
    assert "Images with an equal (to the byte) in another split: 2." in problems
    assert "equal to the byte that bear different labels: 1." in problems
    assert "Groups (slides or patients) with images in several splits: 1, a for one" in problems
    notes = sentences(audit, "note")
    assert "repeat another one after turning or mirroring: 1." in notes
    assert f"Blank: 1 image (1 tumour), {store.ids[5]} for one." in notes
    assert audit.exact.surplus == audit.turned.surplus == 1
    assert sorted(audit.exact.across.tolist()) == [0, 7]
    assert len(audit.turned.across) == 0
    assert audit.shared_groups == ["a"]


def test_a_split_without_a_class_is_a_problem(tmp_path):
    store = make_store(tmp_path / "store", pictures_of(4))
    audit = audit_store(store, np.array(["train", "validation", "train", "validation"]), "given")
    assert "The split train has no image of class tumour." in sentences(audit, "problem")


def test_leaks_from_a_store(tmp_path):
    ours, theirs = pictures_of(10), pictures_of(5, seed=1)
    theirs[0], theirs[1] = ours[1], ours[8]  # trained on, validated on
    theirs[2] = ours[3][:, ::-1]  # trained on, mirrored
    store = make_store(tmp_path / "ours", ours)
    make_store(tmp_path / "theirs", theirs)
    leak = audit_store(store, TRAIN_VALIDATION, "given", [tmp_path / "theirs"]).leaks[0]
    assert leak.by_split == {"train": 1, "validation": 1, "test": 0, "": 0}
    assert leak.turned == 1
    assert leak.harmful == 2
    assert leak.images == (
        (store.ids[1], "train", "to the byte"),
        (store.ids[3], "train", "turned or mirrored"),
        (store.ids[8], "validation", "to the byte"),
    )


def test_what_the_other_set_trains_on_is_no_leak(tmp_path):
    """Kaggle's training patches are PCam's own: only those of its validation and test splits are leaks."""
    ours = pictures_of(6)
    store = make_store(tmp_path / "ours", ours)
    theirs = np.concatenate([ours[[0, 1, 2]], ours[[3]][:, ::-1], pictures_of(2, seed=1)])
    make_store(tmp_path / "theirs", theirs, split=["train", "validation", "test", "train", "test", "train"])
    audit = audit_store(store, splits_of(("train", 6)), "given", [tmp_path / "theirs"])
    leak = audit.leaks[0]
    assert (leak.count, leak.harmful, leak.turned, leak.shared_training) == (3, 2, 0, 1)
    assert [image.id for image in leak.images] == [store.ids[1], store.ids[2]]
    assert "1 training image of" in sentences(audit, "note")
    assert "2 images of" in sentences(audit, "problem")


def test_patches_of_pcams_own_files_are_found_without_preparing_them(tmp_path):
    source = tmp_path / "pcam"
    write_pcam_h5(source)
    import h5py

    parts = {}
    for split in ("train", "valid", "test"):
        with h5py.File(source / f"camelyonpatch_level_2_split_{split}_x.h5") as file:
            parts[split] = file["x"][:2]
    store = make_store(tmp_path / "kaggle", np.concatenate([*parts.values()]))
    leak = audit_store(store, splits_of(("train", 5), ("test", 1)), "given", [source]).leaks[0]
    assert leak.by_split == {"train": 3, "validation": 0, "test": 1, "": 0}
    assert leak.shared_training == 2
    assert [image.id for image in leak.images] == store.ids[2:5].tolist()
    make_store(tmp_path / "small", pictures_of(4))
    with pytest.raises(UserError, match="cannot be the same"):
        audit_store(open_store(tmp_path / "small"), splits_of(("train", 4)), "given", [source])


def test_images_of_another_set_in_the_test_split_decide_nothing(tmp_path):
    store = make_store(tmp_path / "ours", pictures_of(6))
    splits = splits_of(("train", 2), ("validation", 2), ("test", 2))
    (tmp_path / "ids.csv").write_text(f"id,label\n{store.ids[5]},0.5\n{store.ids[4].upper()},0\n")
    audit = audit_store(store, splits, "given", [tmp_path / "ids.csv"])
    assert audit.leaks[0].by_split["test"] == 2
    assert audit.leaks[0].turned is None
    assert "2 images of" in sentences(audit, "note")
    (tmp_path / "others.csv").write_text(f"id\n{'ab' * 20}\n")
    audit = audit_store(store, splits, "given", [tmp_path / "others.csv"])
    assert "None of the 1 image" in sentences(audit, "fine")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("name\nx\n", "no column 'id'"),
        ("id\npatch7\n", "no SHA-1"),
        ("", "no column 'id'"),
        (None, "There is no"),
    ],
)
def test_tables_that_name_no_pixels(tmp_path, content, sentence):
    path = tmp_path / "table.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=sentence):
        read_hashes(path)


def test_images_of_another_shape_cannot_leak(tmp_path):
    store = make_store(tmp_path / "ours", pictures_of(4))
    make_store(tmp_path / "theirs", np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(UserError, match="cannot be the same"):
        audit_store(store, np.array(["train"] * 4), "given", [tmp_path / "theirs"])


def test_samples_are_of_each_class():
    labels = np.array([0] * 5 + [1] * 3 + [-1] * 2, np.int32)
    chosen = sample_by_class(labels, 3, each=4)
    assert [labels[members].tolist() for members in chosen] == [[0] * 4, [1] * 3, [], [-1] * 2]
    assert [members.tolist() for members in chosen] == [
        members.tolist() for members in sample_by_class(labels, 3, each=4)
    ]


# ------------------------------------------------------------------------------------------- slides


def test_slides_reach_patches_by_their_pixels(tmp_path):
    """PCam's own files name slides; a store of the same pixels under other names gets them."""
    source = tmp_path / "pcam"
    write_pcam_h5(source)
    known = slides_by_hash(source)
    meta = next(path for path in source.iterdir() if path.name.endswith("train_meta.csv"))
    assert slides_by_hash(meta) == known
    import h5py

    with h5py.File(source / "camelyonpatch_level_2_split_train_x.h5") as file:
        pictures = file["x"][:6]
    wsi = pd.read_csv(meta)["wsi"].to_numpy()[:6]
    strangers = np.random.default_rng(5).integers(0, 256, (2, *pictures.shape[1:]), dtype=np.uint8)
    both = np.concatenate([pictures, strangers])
    index = pd.DataFrame({"id": [f"patch{n}" for n in range(8)], "label": np.arange(8) % 2})
    store = write_store(tmp_path / "kaggle", both, index, ["normal", "tumour"])
    slides = slides_of(store, known)
    assert slides.tolist() == [*wsi, "", ""]
    named = write_store_with_slides(store, slides, tmp_path / "named")
    assert named.groups.tolist() == slides.tolist()
    assert named.ids.tolist() == store.ids.tolist()
    np.testing.assert_array_equal(named.gather(np.arange(8)), both)
    assert named.digest != store.digest
    assert verify_store(named.path) == []
    assert (named.path / "images-00000.npy").stat().st_ino == (store.path / "images-00000.npy").stat().st_ino
    # a store with groups is a source of slides too
    assert slides_of(store, slides_by_hash(named.path)).tolist() == slides.tolist()
    with pytest.raises(UserError, match="exists already"):
        write_store_with_slides(store, slides, tmp_path / "named")
    assert open_store(store.path).groups.tolist() == [""] * 8


def test_a_set_without_slides(tmp_path):
    make_store(tmp_path / "store", pictures_of(2))
    with pytest.raises(UserError, match="names no slide"):
        slides_by_hash(tmp_path / "store")
