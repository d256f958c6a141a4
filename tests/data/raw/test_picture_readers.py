"""The readers of picture files: what they find, and what they say of broken sources."""

import csv
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import picture_files as files
import pytest
from PIL import Image

from pcam_jax.data.convert import prepare_store, report_path
from pcam_jax.data.raw import ReaderOptions, find_reader
from pcam_jax.data.sample_sources import write_idc_tree, write_isic_folder
from pcam_jax.data.store import Store
from pcam_jax.runtime.errors import UserError


def write(folder: Path, contents: dict[str, bytes]) -> Path:
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def prepare(source: Path, tmp_path: Path, **options: object) -> tuple[Store, list[str]]:
    """A store of what is usable, and what was told."""
    told: list[str] = []
    keys = ("on_error", "reader", "workers", "images_per_shard")
    rest = {key: options.pop(key) for key in keys if key in options}
    store = prepare_store(
        source, tmp_path / "store", notify=told.append, options=ReaderOptions(**options), **rest
    )
    return store, told


def problems(tmp_path: Path) -> list[tuple[str, str]]:
    with open(report_path(tmp_path / "store"), newline="") as file:
        return [(row["problem"], row["id"]) for row in csv.DictReader(file)]


def packed(folder: Path, kind: str) -> Path:
    target = folder.with_name(f"{folder.name}.{kind}")
    if kind == "zip":
        with zipfile.ZipFile(target, "w") as archive:
            for path in sorted(folder.rglob("*.*")):
                archive.write(path, path.relative_to(folder))
    else:
        with tarfile.open(target, f"w:{kind.partition('.')[2]}") as archive:
            archive.add(folder, arcname=".")
    return target


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.xz"])
def test_every_archive_gives_the_folders_store(tmp_path, kind, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    source = write_idc_tree(tmp_path / "idc", patients=2, tiles=4, size=24)
    plain, _ = prepare(source, tmp_path / "a")
    archived, _ = prepare(packed(source, kind), tmp_path / "b")
    assert archived.digest == plain.digest
    assert list(temporary.iterdir()) == []


class TestIdc:
    def test_patients_are_groups_and_edge_tiles_are_mirrored_and_counted(self, tmp_path):
        source = write_idc_tree(tmp_path / "idc", patients=3, tiles=8, edge_share=0.2)
        store, told = prepare(source, tmp_path)
        assert store.image_shape == (50, 50, 3)
        assert store.class_names == ("benign", "idc")
        sizes = {path.stem: np.asarray(Image.open(path)) for path in source.rglob("*.png")}
        assert sorted(sizes) == list(store.ids)
        assert set(store.groups) == {path.name for path in source.iterdir()}
        for row, name in enumerate(store.ids):
            tile = sizes[name]
            assert name.endswith(f"class{store.labels[row]}")
            assert np.array_equal(store.image(row)[:, : tile.shape[1]], tile)
            assert f"_x{store.index['x'][row]}_y{store.index['y'][row]}_" in name
        edges = [name for name, tile in sizes.items() if tile.shape != (50, 50, 3)]
        assert len(edges) > 0
        assert f"{len(edges)} x edge tile padded" in told[-1]
        assert problems(tmp_path) == [("edge tile padded", name) for name in sorted(edges)]
        mirrored = store.image(list(store.ids).index(edges[0]))
        width = sizes[edges[0]].shape[1]
        assert np.array_equal(mirrored[:, width], sizes[edges[0]][:, -1])

    def test_edge_tiles_can_be_skipped(self, tmp_path):
        source = write_idc_tree(tmp_path / "idc", patients=3, tiles=8, edge_share=0.2)
        edges = sum(np.asarray(Image.open(path)).shape != (50, 50, 3) for path in source.rglob("*.png"))
        store, told = prepare(source, tmp_path, edges="skip")
        assert len(store) == 24 - edges
        assert told == [f"{edges} edge tiles are skipped."]

    def test_the_second_copy_in_kaggles_archive_is_left_aside(self, tmp_path):
        source = write_idc_tree(tmp_path / "idc", patients=2, tiles=4, size=24)
        shutil.copytree(source, tmp_path / "copy")
        shutil.move(tmp_path / "copy", source / "IDC_regular_ps50_idx5")
        store, told = prepare(source, tmp_path)
        assert len(store) == 8
        assert "8 tiles are there twice" in told[0]

    def test_a_resumed_run_counts_the_padded_tiles_once(self, tmp_path, monkeypatch):
        from pcam_jax.data.partial import PartialStore

        source = write_idc_tree(tmp_path / "idc", patients=3, tiles=8, edge_share=0.3)
        whole, _ = prepare(source, tmp_path / "a", images_per_shard=4)

        def fail(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(PartialStore, "mark_done", fail)
            with pytest.raises(KeyboardInterrupt):
                prepare(source, tmp_path / "b", images_per_shard=4)
        resumed, told = prepare(source, tmp_path / "b", images_per_shard=4)
        assert "Going on where an earlier run stopped." in told
        assert resumed.manifest.prepare["remarks"] == whole.manifest.prepare["remarks"]

    def test_broken_tiles_are_named(self, tmp_path):
        source = write_idc_tree(tmp_path / "idc", patients=2, tiles=6, size=24, edge_share=0)
        whole = sorted(source.rglob("*.png"))
        whole[0].write_bytes(whole[0].read_bytes()[:100])
        whole[1].write_bytes(b"")
        whole[2].write_bytes(files.giant_png())
        whole[3].rename(whole[3].with_name("tile.png"))
        whole[4].write_bytes(files.png(size=(30, 30)))
        label = whole[5].parent.name
        other = source / whole[5].parent.parent.name / str(1 - int(label))
        other.mkdir(exist_ok=True)
        whole[5].rename(other / whole[5].name)
        with pytest.raises(UserError, match=r"1 x contradictory label .*; see .*--on-error skip"):
            prepare(source, tmp_path)
        found = {name: problem for problem, name in problems(tmp_path)}
        assert found == {
            whole[0].stem: "unreadable",
            whole[1].stem: "empty file",
            whole[2].stem: "too large",
            "tile": "bad name",
            whole[4].stem: "wrong size",
            whole[5].stem: "contradictory label",
        }
        assert len(prepare(source, tmp_path, on_error="skip")[0]) == 6


class TestFolders:
    def test_three_classes_with_splits_odd_names_and_groups(self, tmp_path):
        names = ["train/zwölf/s1_a b.png", "train/zwölf/s2_c.png", "train/eins/s1_x.jpg",
                 "train/eins/deep/s3_y.png",
                 "val/drei/s4_日本.png",
                 "train/drei/s5_q.png", "test/eins/s6_t.png", "test/s7_without class.png"]  # fmt: skip
        contents = {
            name: files.jpeg(n, (20, 16)) if name.endswith("jpg") else files.png(n)
            for n, name in enumerate(names)
        }
        source = write(
            tmp_path / "my pictures", {f"set/{name}": content for name, content in contents.items()}
        )
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

    def test_sizes_must_agree_unless_resized(self, tmp_path):
        source = write(tmp_path / "set", {"a/1.png": files.png(), "b/2.png": files.png(size=(30, 16))})
        with pytest.raises(UserError, match=r"different sizes \(.*20x16.*\): give --size N"):
            prepare(source, tmp_path)
        store, _ = prepare(source, tmp_path, size=24)
        assert store.image_shape == (24, 24, 3)
        assert store.manifest.source["size"] == 24
        with pytest.raises(UserError, match="other settings"):
            prepare(source, tmp_path, size=24, fit="crop")

    def test_a_stray_size_is_a_named_fault(self, tmp_path):
        contents = {f"{'ab'[n % 2]}/{n}.png": files.png(n) for n in range(20)} | {
            "a/odd.png": files.png(size=(9, 9))
        }
        with pytest.raises(UserError, match=r"wrong size: a/odd \(9x9 instead of 20x16; --size N resizes\)"):
            prepare(write(tmp_path / "set", contents), tmp_path)

    def test_faults_of_the_listing(self, tmp_path):
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

    def test_unusual_pictures_are_kept_and_counted(self, tmp_path):
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
        assert {("grey", "b/5"), ("grey", "b/6"), ("turned as its EXIF says", "b/6")} <= set(
            problems(tmp_path)
        )


class TestTable:
    TABLE = "file,kind,slide,part,age\na b.png,dog,s1,train,5\nü.png,cat,s2,val,\nsub/c,bird,s3,test,7\n"
    COLUMNS: ClassVar = {
        "id_column": "file",
        "label_column": "kind",
        "group_column": "slide",
        "split_column": "part",
    }

    @pytest.fixture
    def source(self, tmp_path) -> Path:
        contents = {"images/a b.png": files.png(), "images/ü.png": files.png(1), "sub/c.png": files.png(2)}
        return write(tmp_path / "set", contents | {"labels.csv": self.TABLE.replace("sub/c", "c").encode()})

    def test_columns_by_name(self, source, tmp_path):
        store, _ = prepare(source, tmp_path, **self.COLUMNS)
        assert store.class_names == ("bird", "cat", "dog")
        rows = store.index[["id", "label", "group", "split", "age"]].astype(str).to_numpy().tolist()
        assert rows == [["a b.png", "2", "s1", "train", "5"], ["ü.png", "1", "s2", "validation", ""],
                        ["c", "0", "s3", "test", "7"]]  # fmt: skip
        assert np.array_equal(store.image(1), np.asarray(files.picture(seed=1)))

    def test_classes_in_the_order_given_and_numbers_by_value(self, source, tmp_path):
        store, _ = prepare(source, tmp_path, classes=("dog", "cat", "bird"), **self.COLUMNS)
        assert list(store.labels) == [0, 1, 2]
        (source / "labels.csv").write_text("id,label\na b.png,10\nü.png,9\nc,\n")
        store, _ = prepare(source, tmp_path / "b", reader="table")
        assert store.class_names == ("9", "10")
        assert list(store.labels) == [1, 0, -1]

    def test_rows_and_pictures_that_do_not_fit(self, source, tmp_path):
        write(
            source,
            {"images/extra.png": files.png(3), "images/x.png": files.png(), "other/x.png": files.png()},
        )
        rows = ["a b.png,dog,s1,train,5", "a b.png,cat,s1,train,5", "a b,dog,s1,train,5", "missing,dog,s1,train,",
                "ü.png,cat,s2,sometimes,", "c,cat,s3,test,7", "x,dog,s3,test,7",
                ",dog,s,train,", "c,dog"]  # fmt: skip
        (source / "labels.csv").write_text("file,kind,slide,part,age\n" + "\n".join(rows))
        with pytest.raises(UserError, match="1 x ambiguous name"):
            prepare(source, tmp_path, **self.COLUMNS)
        assert sorted(problems(tmp_path)) == sorted([
            ("duplicate id", "a b.png"), ("duplicate id", "a b"), ("label without image", "missing"),
            ("bad split", "ü.png"), ("ambiguous name", "x"), ("bad row", ""), ("bad row", ""),
            ("image without label", "extra"),
        ])  # fmt: skip

    def test_unusable_tables(self, source, tmp_path):
        for options, said in [
            ({}, "has no column 'id' .*--id-column"),
            ({"id_column": "file"}, "has no column 'label' .*--label-column"),
            ({"csv": "other.csv"}, "has no table other.csv: it has labels.csv"),
            ({**self.COLUMNS, "label_column": "file", "id_column": "kind"}, "names no picture"),
        ]:
            with pytest.raises(UserError, match=said):
                prepare(source, tmp_path, reader="table", **options)
        (source / "second.csv").write_text("id\n")
        with pytest.raises(UserError, match=r"2 CSV tables .*--csv"):
            prepare(source, tmp_path, reader="table")


class TestIsic:
    @pytest.fixture
    def source(self, tmp_path) -> Path:
        return write_isic_folder(tmp_path / "isic", count=12, patients=4, width=160, test_count=2)

    def test_patients_metadata_and_test_split(self, source, tmp_path):
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

    def test_500_by_default_and_the_same_by_workers(self, source, tmp_path):
        alone, _ = prepare(source, tmp_path / "a")
        shared, _ = prepare(source, tmp_path / "b", workers=2, images_per_shard=5)
        assert alone.image_shape == (500, 500, 3)
        assert np.array_equal(alone.hashes(), shared.hashes())

    def test_broken_sources_are_named(self, source, tmp_path):
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

    def test_without_a_table_of_targets(self, source, tmp_path):
        (source / "train.csv").unlink()
        with pytest.raises(UserError, match="no table with the columns image_name, patient_id and target"):
            prepare(source, tmp_path)


def test_layouts_are_told_apart(tmp_path):
    write_idc_tree(tmp_path / "idc", patients=2, tiles=2, size=24)
    write_isic_folder(tmp_path / "isic", count=4, patients=2, width=60, test_count=0)
    write(tmp_path / "folders", {"a/1.png": files.png(), "b/2.png": files.png()})
    write(tmp_path / "table", {"train/1.png": files.png(), "test/2.png": files.png(), "t.csv": b"id,label\n"})
    for name in ("idc", "isic", "folders", "table"):
        assert find_reader(tmp_path / name).name == name
    for name in ("one", "none"):
        write(tmp_path / name, {"a/1.png" if name == "one" else "x.txt": files.png()})
        with pytest.raises(UserError, match="is of no known layout"):
            find_reader(tmp_path / name)


def test_a_damaged_tar_is_said_in_a_sentence(tmp_path):
    source = write_idc_tree(tmp_path / "idc", patients=2, tiles=4, size=24)
    for kind in ("tar", "tar.gz"):
        archive = packed(source, kind)
        archive.write_bytes(archive.read_bytes()[: archive.stat().st_size * 2 // 3])
        with pytest.raises(UserError, match=r"damaged|beyond the end|unreadable"):
            prepare(archive, tmp_path)


def test_a_flipped_bit_in_a_compressed_tar_is_said_in_a_sentence(tmp_path):
    archive = packed(write(tmp_path / "set", {"a/1.png": files.png(), "b/2.png": files.png(1)}), "tar.gz")
    sound, said = archive.read_bytes(), set()
    for at in range(300, len(sound) - 8, 97):
        archive.write_bytes(sound[:at] + bytes([sound[at] ^ 64]) + sound[at + 1 :])
        try:
            prepare(archive, tmp_path)
        except UserError as error:
            said.add(str(error).split("(")[0])
    assert any("is damaged" in sentence for sentence in said)


def test_a_bomb_fills_no_disk(tmp_path, monkeypatch):
    """A gz of a megabyte that would take a gigabyte, where 100 MB are free."""
    import gzip
    import tempfile

    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    real = shutil.disk_usage(tmp_path)

    def usage(path):
        written = sum(file.stat().st_size for file in (tmp_path / "tmp").iterdir())
        return real._replace(free=100 * 2**20 - written)

    monkeypatch.setattr("shutil.disk_usage", usage)
    with (
        gzip.open(tmp_path / "set.tar.gz", "wb", compresslevel=1) as file,
        tarfile.open(fileobj=file, mode="w") as archive,
    ):
        for name in ("a/1.png", "b/2.png"):
            member = tarfile.TarInfo(name)
            member.size = 2**29
            archive.addfile(member, Zeros(2**29))
    with pytest.raises(UserError, match="needs more temporary space than"):
        prepare(tmp_path / "set.tar.gz", tmp_path)
    assert not list((tmp_path / "tmp").iterdir())


class Zeros:
    """A file of zeros."""

    def __init__(self, size):
        self.left = size

    def read(self, count):
        count = min(count, self.left)
        self.left -= count
        return bytes(count)


def test_a_tar_with_links_and_repeats(tmp_path):
    source = write(tmp_path / "set", {"a/1.png": files.png(), "b/2.png": files.png(1)})
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        archive.add(source, arcname="set")
        archive.add(source / "a/1.png", arcname="set/a/1.png")
        link = tarfile.TarInfo("set/a/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "1.png"
        archive.addfile(link)
    with pytest.raises(UserError):
        prepare(tmp_path / "set.tar", tmp_path)
    assert sorted(problems(tmp_path)) == [("duplicate file", "1"), ("not a plain file", "link")]
    assert len(prepare(tmp_path / "set.tar", tmp_path, on_error="skip")[0]) == 2


def test_a_full_temporary_folder_is_said_before_anything_is_written(tmp_path, monkeypatch):
    archive = packed(write(tmp_path / "set", {"a/1.png": files.png(), "b/2.png": files.png()}), "tar.gz")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"temporary space.*set TMPDIR"):
        prepare(archive, tmp_path)
