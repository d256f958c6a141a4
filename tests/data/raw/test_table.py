"""The reader of pictures named by a table: what it finds, and what it says of broken sources."""

from pathlib import Path

import numpy as np
import picture_files as files
import pytest
from picture_sources import prepare, problems, write

from pcam_jax.runtime.errors import UserError

TABLE = "file,kind,slide,part,age\na b.png,dog,s1,train,5\nü.png,cat,s2,val,\nsub/c,bird,s3,test,7\n"
COLUMNS = {
    "id_column": "file",
    "label_column": "kind",
    "group_column": "slide",
    "split_column": "part",
}


@pytest.fixture
def source(tmp_path) -> Path:
    contents = {"images/a b.png": files.png(), "images/ü.png": files.png(1), "sub/c.png": files.png(2)}
    return write(tmp_path / "set", contents | {"labels.csv": TABLE.replace("sub/c", "c").encode()})


def test_columns_by_name(source, tmp_path):
    store, _ = prepare(source, tmp_path, **COLUMNS)
    assert store.class_names == ("bird", "cat", "dog")
    rows = store.index[["id", "label", "group", "split", "age"]].astype(str).to_numpy().tolist()
    assert rows == [["a b.png", "2", "s1", "train", "5"], ["ü.png", "1", "s2", "validation", ""],
                    ["c", "0", "s3", "test", "7"]]  # fmt: skip
    assert np.array_equal(store.image(1), np.asarray(files.picture(seed=1)))


def test_classes_in_the_order_given_and_numbers_by_value(source, tmp_path):
    store, _ = prepare(source, tmp_path, classes=("dog", "cat", "bird"), **COLUMNS)
    assert list(store.labels) == [0, 1, 2]
    (source / "labels.csv").write_text("id,label\na b.png,10\nü.png,9\nc,\n")
    store, _ = prepare(source, tmp_path / "b", reader="table")
    assert store.class_names == ("9", "10")
    assert list(store.labels) == [1, 0, -1]


def test_rows_and_pictures_that_do_not_fit(source, tmp_path):
    write(
        source,
        {"images/extra.png": files.png(3), "images/x.png": files.png(), "other/x.png": files.png()},
    )
    rows = ["a b.png,dog,s1,train,5", "a b.png,cat,s1,train,5", "a b,dog,s1,train,5", "missing,dog,s1,train,",
            "ü.png,cat,s2,sometimes,", "c,cat,s3,test,7", "x,dog,s3,test,7",
            ",dog,s,train,", "c,dog"]  # fmt: skip
    (source / "labels.csv").write_text("file,kind,slide,part,age\n" + "\n".join(rows))
    with pytest.raises(UserError, match="1 x ambiguous name"):
        prepare(source, tmp_path, **COLUMNS)
    assert sorted(problems(tmp_path)) == sorted([
        ("duplicate id", "a b.png"), ("duplicate id", "a b"), ("label without image", "missing"),
        ("bad split", "ü.png"), ("ambiguous name", "x"), ("bad row", ""), ("bad row", ""),
        ("image without label", "extra"),
    ])  # fmt: skip


def test_unusable_tables(source, tmp_path):
    for options, said in [
        ({}, "has no column 'id' .*--id-column"),
        ({"id_column": "file"}, "has no column 'label' .*--label-column"),
        ({"csv": "other.csv"}, "has no table other.csv: it has labels.csv"),
        ({**COLUMNS, "label_column": "file", "id_column": "kind"}, "names no picture"),
    ]:
        with pytest.raises(UserError, match=said):
            prepare(source, tmp_path, reader="table", **options)
    (source / "second.csv").write_text("id\n")
    with pytest.raises(UserError, match=r"2 CSV tables .*--csv"):
        prepare(source, tmp_path, reader="table")
