"""The reader of a folder for each class: what it finds, and what it says of broken sources."""

import picture_files as files
import pytest
from picture_sources import prepare, problems, write

from pcam_jax.runtime.errors import UserError


def test_three_classes_with_splits_odd_names_and_groups(tmp_path):
    names = ["train/zwölf/s1_a b.png", "train/zwölf/s2_c.png", "train/eins/s1_x.jpg",
             "train/eins/deep/s3_y.png",
             "val/drei/s4_日本.png",
             "train/drei/s5_q.png", "test/eins/s6_t.png", "test/s7_without class.png"]  # fmt: skip
    contents = {
        name: files.jpeg(n, (20, 16)) if name.endswith("jpg") else files.png(n)
        for n, name in enumerate(names)
    }
    source = write(tmp_path / "my pictures", {f"set/{name}": content for name, content in contents.items()})
    (source / "set/readme.txt").write_text("hello")
    store, told = prepare(source, tmp_path, group_pattern=r"/(s\d+)_")
    assert store.class_names == ("drei", "eins", "zwölf")
    assert store.image_shape == (16, 20, 3)
    rows = {row.id: (row.label, row.split, row.group) for row in store.index.itertuples()}
    assert rows == {
        "train/zwölf/s1_a b": (2, "train", "s1"),
        "train/zwölf/s2_c": (2, "train", "s2"),
        "train/eins/s1_x": (1, "train", "s1"),
        "train/eins/deep/s3_y": (1, "train", "s3"),
        "val/drei/s4_日本": (0, "validation", "s4"),
        "train/drei/s5_q": (0, "train", "s5"),
        "test/eins/s6_t": (1, "test", "s6"),
        "test/s7_without class": (-1, "test", "s7"),
    }
    assert told == ["Left aside, no pictures: set/readme.txt."]


def test_sizes_must_agree_unless_resized(tmp_path):
    source = write(tmp_path / "set", {"a/1.png": files.png(), "b/2.png": files.png(size=(30, 16))})
    with pytest.raises(UserError, match=r"different sizes \(.*20x16.*\): give --size N"):
        prepare(source, tmp_path)
    store, _ = prepare(source, tmp_path, size=24)
    assert store.image_shape == (24, 24, 3)
    assert store.manifest.source["size"] == 24
    with pytest.raises(UserError, match="other settings"):
        prepare(source, tmp_path, size=24, fit="crop")


def test_a_stray_size_is_a_named_fault(tmp_path):
    contents = {f"{'ab'[n % 2]}/{n}.png": files.png(n) for n in range(20)} | {
        "a/odd.png": files.png(size=(9, 9))
    }
    with pytest.raises(UserError, match=r"wrong size: a/odd \(9x9 instead of 20x16; --size N resizes\)"):
        prepare(write(tmp_path / "set", contents), tmp_path)


def test_faults_of_the_listing(tmp_path):
    contents = {
        "a/1.png": files.png(),
        "a/1.jpg": files.jpeg(size=(20, 16)),
        "b/2.png": files.png(1),
        "3.png": files.png(),
    }
    source = write(tmp_path / "set", contents)
    with pytest.raises(UserError):
        prepare(source, tmp_path)
    assert sorted(problems(tmp_path)) == [("duplicate id", "a/1"), ("no class", "3")]
    for options, said in [
        ({"classes": ("a", "c")}, "names 'c', which is no folder"),
        ({"classes": ("a", "a")}, "names a class twice"),
        ({"group_pattern": "("}, "no regular expression"),
        ({"group_pattern": "a"}, "needs a parenthesis"),
        ({"size": 0}, "--size is 0"),
        ({"edges": "skip"}, "reader folders has no option --edges"),
    ]:
        with pytest.raises(UserError, match=said):
            prepare(source, tmp_path, **options)
    (source / "a" / b"bad\xff.png".decode(errors="surrogateescape")).write_bytes(files.png())
    with pytest.raises(UserError, match="1 x bad name"):
        prepare(source, tmp_path)


def test_unusual_pictures_are_kept_and_counted(tmp_path):
    contents = {"a/1.png": files.png(mode="L"), "a/2.png": files.png(mode="RGBA"), "a/3.png": files.png(),
                "b/4.jpg": files.jpeg(size=(20, 16), mode="CMYK"), "b/5.png": files.png(mode="L"),
                "b/6.jpg": files.turned_jpeg(6, (16, 20), mode="L")}  # fmt: skip
    store, told = prepare(write(tmp_path / "set", contents), tmp_path)
    assert len(store) == 6
    assert store.manifest.prepare["remarks"] == {
        "CMYK converted": 1,
        "grey": 3,
        "transparency laid on white": 1,
        "turned as its EXIF says": 1,
    }
    assert "3 x grey" in told[0]
    assert {("grey", "b/5"), ("grey", "b/6"), ("turned as its EXIF says", "b/6")} <= set(problems(tmp_path))
