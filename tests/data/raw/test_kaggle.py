import zipfile
from pathlib import Path

import numpy as np
import pytest

from pcam_jax.data.raw import find_reader
from pcam_jax.data.raw.kaggle import KaggleReader
from pcam_jax.runtime.errors import UserError


def faults_of(path: Path) -> list[tuple[str, str, str]]:
    _, faults = find_reader(path).records()
    return sorted((fault.problem, fault.id, fault.split) for fault in faults)


@pytest.fixture
def source(kaggle_folder):
    return kaggle_folder()


def test_lists_train_by_id_and_test_in_the_submissions_order(source):
    reader = find_reader(source.path)
    records, faults = reader.records()
    assert isinstance(reader, KaggleReader)
    assert faults == []
    assert [record.id for record in records] == [*source.train, *source.test]
    assert [record.label for record in records] == [*source.train.values(), *[-1] * len(source.test)]
    assert [record.split for record in records] == ["train"] * 12 + ["test"] * 5
    assert source.test != sorted(source.test)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("prefix", ["", "histopathologic-cancer-detection/", "deep/er/"])
def test_a_zip_reads_like_its_folder_whatever_folder_it_is_in(source, method, prefix):
    archive = source.zip(method, prefix)
    with zipfile.ZipFile(archive, "a") as more:
        more.writestr("__MACOSX/train/._x.tif", b"junk")
    folder, zipped = find_reader(source.path), find_reader(archive)
    expected, _ = folder.records()
    records, faults = zipped.records()
    assert faults == []
    assert [(r.id, r.label, r.split, r.source) for r in records] == [
        (r.id, r.label, r.split, r.source) for r in expected
    ]
    image = np.empty((96, 96, 3), np.uint8)
    for record in records:
        zipped.read(record, image)
        assert np.array_equal(image, source.images[record.id])


def test_the_folder_may_lie_one_folder_deeper(source):
    records, faults = find_reader(source.path.parent).records()
    assert (len(records), faults) == (17, [])


def test_either_split_may_be_missing(kaggle_folder):
    train = find_reader(kaggle_folder(train=4, test=0).path)
    assert [record.split for record in train.records()[0]] == ["train"] * 4
    test = find_reader(kaggle_folder(train=0, test=4).path)
    assert [record.split for record in test.records()[0]] == ["test"] * 4
    assert test.notes()


def test_tables_of_a_split_that_was_not_downloaded_are_left_aside(source):
    labels = source.path / "train_labels.csv"
    for tif in (source.path / "train").iterdir():
        tif.unlink()
    (source.path / "train").rmdir()
    reader = find_reader(source.path)
    records, faults = reader.records()
    assert ([record.id for record in records], faults) == (source.test, [])
    assert labels.name in reader.notes()[0]


def test_test_images_without_a_submission_come_by_id(source):
    (source.path / "sample_submission.csv").unlink()
    records, faults = find_reader(source.path).records()
    assert [record.id for record in records[12:]] == sorted(source.test)
    assert faults == []


def test_everything_wrong_with_the_listing_is_a_fault(source):
    names = list(source.train)
    source.tif(names[0]).unlink()
    source.tif(source.test[0]).unlink()
    table = source.path / "train_labels.csv"
    rows = table.read_text().splitlines()
    rows = [row for row in rows if not row.startswith(names[1])]
    rows = [f"{names[2]},2" if row.startswith(names[2]) else row for row in rows]
    table.write_text("\n".join([*rows, f"{names[3]},{source.train[names[3]]}"]))
    (source.path / "train/odd name.tif").write_bytes(b"")
    submission = source.path / "sample_submission.csv"
    submission.write_text(submission.read_text().replace(f"{source.test[1]},0\n", ""))
    (source.path / f"train/{source.test[2]}.tif").write_bytes(source.tif(source.test[2]).read_bytes())
    table.write_text(table.read_text() + f"\n{source.test[2]},1\n")
    assert faults_of(source.path) == sorted(
        [
            ("label without image", names[0], "train"),
            ("test id without image", source.test[0], "test"),
            ("image without label", names[1], "train"),
            ("bad label", names[2], "train"),
            ("duplicate id", names[3], "train"),
            ("bad name", "odd name", "train"),
            ("not in the submission", source.test[1], "test"),
            ("in both splits", source.test[2], "train"),
        ]
    )


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: (path / "train_labels.csv").unlink(), "has training images but no train_labels.csv"),
        (lambda path: (path / "train_labels.csv").write_text("id,klass\n"), "no column 'label'"),
        (lambda path: (path / "train_labels.csv").write_bytes(b"\xff\xfe\0\0"), "not UTF-8"),
    ],
)
def test_a_missing_or_odd_label_table_is_an_error(source, spoil, said):
    spoil(source.path)
    with pytest.raises(UserError, match=said):
        find_reader(source.path).records()


def test_two_sets_in_one_place_are_ambiguous(kaggle_folder):
    first = kaggle_folder()
    kaggle_folder()
    with pytest.raises(UserError, match=r"several sets \(kaggle1/, kaggle2/\)"):
        find_reader(first.path.parent).records()


def test_unknown_sources_and_readers_are_errors(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    for path, name, said in [
        (tmp_path / "none", None, "There is no"),
        (tmp_path, None, "no known layout"),
        (tmp_path / "a.txt", None, "no known layout"),
        (tmp_path, "kaggle", "not laid out as Kaggle's"),
        (tmp_path / "a.txt", "kaggle", "neither a folder nor a zip"),
        (tmp_path, "h6", "no reader 'h6'"),
    ]:
        with pytest.raises(UserError, match=said):
            find_reader(path, name).records()


def test_the_miniature_is_read_whole(pcam_mini):
    records, faults = find_reader(pcam_mini).records()
    assert faults == []
    assert [sum(record.split == split for record in records) for split in ("train", "test")] == [5000, 993]
    assert sum(record.label for record in records[:5000]) == 1998
