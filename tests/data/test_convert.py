import csv
import os
import shutil
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kaggle_source import SHARD, KaggleSource, assert_holds, contents, make_kaggle_folder

from pcam_jax.data.convert import prepare_part, prepare_store, report_path
from pcam_jax.data.integrity import verify_store
from pcam_jax.runtime.errors import UserError


@pytest.fixture
def source(kaggle_folder) -> KaggleSource:
    return kaggle_folder(train=14, test=7)


def problems(store: Path) -> list[tuple[str, str]]:
    with open(report_path(store), newline="") as file:
        return [(row["problem"], row["id"]) for row in csv.DictReader(file)]


def test_a_folder_and_its_zip_become_the_same_store(source, tmp_path):
    store = prepare_store(source.path, tmp_path / "folder", images_per_shard=SHARD)
    zipped = prepare_store(source.zip(), tmp_path / "new/zip", images_per_shard=SHARD)
    assert_holds(store, source)
    assert store.digest == zipped.digest
    assert store.manifest.counts["test"] == {"unknown": 7}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "kaggle1", "kaggle1.zip", "new"]
    assert store.manifest.source == {"reader": "kaggle", "path": str(source.path), "kind": "folder"}


def test_worker_processes_make_the_same_bytes(source, tmp_path):
    alone = prepare_store(source.path, tmp_path / "alone", images_per_shard=SHARD)
    shared = prepare_store(source.path, tmp_path / "shared", images_per_shard=SHARD, workers=2)
    assert contents(alone.path) == contents(shared.path)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_parts_merge_to_the_same_bytes(source, tmp_path, order):
    whole = prepare_store(source.path, tmp_path / "whole", images_per_shard=SHARD)
    made = [
        prepare_part(source.path, tmp_path / "parts", part=part, parts=3, images_per_shard=SHARD)
        for part in order
    ]
    assert made[:2] == [None, None]
    assert contents(made[2].path) == contents(whole.path)
    assert not (tmp_path / "parts.partial").exists()


def test_parts_made_apart_are_put_together_in_one_folder(source, tmp_path):
    whole = prepare_store(source.path, tmp_path / "whole", images_per_shard=SHARD)
    for part in range(2):
        place = tmp_path / f"machine{part}/store"
        assert prepare_part(source.path, place, part=part, parts=2, images_per_shard=SHARD) is None
    shutil.copytree(
        tmp_path / "machine1/store.partial", tmp_path / "machine0/store.partial", dirs_exist_ok=True
    )
    merged = prepare_part(source.path, tmp_path / "machine0/store", part=0, parts=2, images_per_shard=SHARD)
    assert contents(merged.path) == contents(whole.path)


def test_more_parts_than_shards(source, tmp_path):
    for part in range(3):
        store = prepare_part(source.path, tmp_path / "store", part=part, parts=3)
    assert_holds(store, source)


def test_the_same_source_again_is_already_prepared(source, tmp_path):
    told: list[str] = []
    first = prepare_store(source.path, tmp_path / "store", notify=told.append)
    (tmp_path / "store.partial").mkdir()  # as a kill right after the rename leaves it
    again = prepare_store(source.zip(), tmp_path / "store", notify=told.append)
    assert again.digest == first.digest
    assert told == [f"{tmp_path / 'store'} is already prepared from this source: 21 images."]
    assert not (tmp_path / "store.partial").exists()


def test_occupied_destinations_are_refused(source, kaggle_folder, tmp_path):
    prepare_store(source.path, tmp_path / "store")
    (tmp_path / "file").write_text("x")
    other = kaggle_folder(seed=1)
    for destination, said in [
        (tmp_path / "store", "was made from another source"),
        (tmp_path / "file", "is a file"),
        (source.path, "exists and is not a store"),
        (tmp_path / "file/store", "cannot be made"),
    ]:
        with pytest.raises(UserError, match=said):
            prepare_store(other.path, destination)
    with pytest.raises(UserError, match="a prepared store already"):
        prepare_store(tmp_path / "store", tmp_path / "again")
    (tmp_path / "empty").mkdir()
    assert_holds(prepare_store(other.path, tmp_path / "empty"), other)


@pytest.mark.parametrize(
    "option", [{"workers": 0}, {"images_per_shard": 0}, {"on_error": "ignore"}, {"part": 2, "parts": 2}]
)
def test_impossible_options_are_errors(source, tmp_path, option):
    with pytest.raises(UserError):
        prepare_part(source.path, tmp_path / "store", **option)


class TestFaults:
    @pytest.fixture
    def spoiled(self, source) -> tuple[KaggleSource, list[tuple[str, str]]]:
        names = list(source.train)
        source.tif(names[0]).write_bytes(source.tif(names[1]).read_bytes())
        source.tif(names[6]).write_bytes(source.tif(names[6]).read_bytes()[:9000])
        source.tif(names[9]).unlink()
        source.tif(source.test[3]).write_bytes(b"")
        return source, [
            ("label without image", names[9]),
            ("pixels differ", names[0]),
            ("unreadable", names[6]),
            ("unreadable", source.test[3]),
        ]

    @pytest.mark.parametrize("workers", [1, 2])
    def test_all_are_found_and_named_before_it_stops(self, spoiled, tmp_path, workers):
        source, expected = spoiled
        with pytest.raises(UserError) as caught:
            prepare_store(source.path, tmp_path / "store", images_per_shard=SHARD, workers=workers)
        for _, name in expected:
            assert name in str(caught.value)
        assert str(report_path(tmp_path / "store")) in str(caught.value)
        assert problems(tmp_path / "store") == expected
        assert sorted(path.name for path in tmp_path.iterdir()) == ["kaggle1", "store.prepare_report.csv"]

    def test_a_part_does_not_pass_over_what_another_skipped(self, source, tmp_path):
        name = next(iter(source.train))
        source.tif(name).write_bytes(b"")
        half = {"parts": 2, "images_per_shard": SHARD}
        assert prepare_part(source.path, tmp_path / "s", part=0, on_error="skip", **half) is None
        with pytest.raises(UserError, match=name):
            prepare_part(source.path, tmp_path / "s", part=1, **half)
        assert not (tmp_path / "s").exists()
        store = prepare_part(source.path, tmp_path / "s", part=1, on_error="skip", **half)
        assert_holds(store, source, (name,))

    @pytest.mark.parametrize("parts", [1, 2])
    def test_skip_goes_on_without_them(self, spoiled, tmp_path, parts):
        source, expected = spoiled
        for part in range(parts):
            store = prepare_part(
                source.path,
                tmp_path / "store",
                part=part,
                parts=parts,
                on_error="skip",
                images_per_shard=SHARD,
            )
        assert_holds(store, source, tuple(name for _, name in expected))
        assert problems(tmp_path / "store") == expected
        assert store.manifest.prepare["left_out"] == 4
        again = prepare_store(source.path, store.path, on_error="skip", images_per_shard=SHARD)
        assert again.digest == store.digest
        with pytest.raises(UserError, match="with other settings"):
            prepare_store(source.path, store.path, images_per_shard=SHARD)

    def test_a_whole_bad_shard_is_left_out(self, source, tmp_path):
        bad = list(source.train)[5:10]
        for name in bad:
            source.tif(name).write_bytes(b"")
        store = prepare_store(source.path, tmp_path / "store", on_error="skip", images_per_shard=SHARD)
        assert_holds(store, source, tuple(bad))
        assert [shard.file for shard in store.manifest.shards] == [
            f"images-0000{n}.npy" for n in (0, 2, 3, 4)
        ]

    def test_a_report_of_an_earlier_try_goes_when_all_is_well(self, source, tmp_path):
        name = next(iter(source.train))
        sound = source.tif(name).read_bytes()
        source.tif(name).write_bytes(b"")
        with pytest.raises(UserError, match=f"unreadable: {name}"):
            prepare_store(source.path, tmp_path / "store")
        source.tif(name).write_bytes(sound)
        assert_holds(prepare_store(source.path, tmp_path / "store"), source)
        assert not report_path(tmp_path / "store").exists()

    def test_nothing_but_faults_is_an_error_even_when_skipping(self, kaggle_folder, tmp_path):
        source = kaggle_folder(train=2, test=0)
        for name in source.train:
            source.tif(name).write_bytes(b"")
        with pytest.raises(UserError, match="nothing is left"):
            prepare_store(source.path, tmp_path / "store", on_error="skip")
        assert not (tmp_path / "store.partial").exists()

    def test_damaged_zip_members_are_faults(self, source, tmp_path):
        archive = source.zip(zipfile.ZIP_STORED)
        with zipfile.ZipFile(archive) as opened:
            info = opened.infolist()[3]
        content = bytearray(archive.read_bytes())
        content[info.header_offset + 5000] ^= 1
        archive.write_bytes(content)
        with pytest.raises(UserError, match="CRC-32"):
            prepare_store(archive, tmp_path / "store")
        assert problems(tmp_path / "store") == [("unreadable", Path(info.filename).stem)]

    def test_names_that_are_no_text_are_reported(self, source, tmp_path):
        for name in (b"\xff\xfe.tif", b"two\nlines.tif"):
            Path(os.fsdecode(os.fsencode(source.path) + b"/train/" + name)).write_bytes(b"")
        with pytest.raises(UserError) as caught:
            prepare_store(source.path, tmp_path / "store")
        assert "two lines" in str(caught.value)
        assert "\\udcff\\udcfe" in str(caught.value)
        assert len(problems(tmp_path / "store")) == 2

    def test_a_part_that_fails_leaves_the_others_work(self, spoiled, tmp_path):
        source, _ = spoiled
        with pytest.raises(UserError):
            prepare_part(source.path, tmp_path / "store", part=0, parts=2, images_per_shard=SHARD)
        assert not (tmp_path / "store.partial").exists()
        (tmp_path / "store.partial/part-1-of-2").mkdir(parents=True)
        with pytest.raises(UserError):
            prepare_part(source.path, tmp_path / "store", part=0, parts=2, images_per_shard=SHARD)
        assert [path.name for path in (tmp_path / "store.partial/store").iterdir()] == []


@settings(deadline=None, derandomize=True, max_examples=60)
@given(data=st.data())
def test_fuzzed_zips_become_a_sound_store_or_a_user_error(tmp_path_factory, data):
    place = tmp_path_factory.mktemp("fuzz")
    archive = make_kaggle_folder(place / "set", 3, 1).zip(zipfile.ZIP_STORED)
    content = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as opened:
        tables = [info.header_offset for info in opened.infolist() if info.filename.endswith("csv")]
    directory = content.index(b"PK\1\2")
    for _ in range(data.draw(st.integers(1, 4))):
        region = data.draw(st.sampled_from([0, *tables, directory, directory, directory]))
        at = data.draw(st.integers(region, min(region + 400, len(content) - 1)))
        content[at] = data.draw(st.integers(0, 255))
    archive.write_bytes(content)
    on_error = data.draw(st.sampled_from(["stop", "skip"]))
    try:
        store = prepare_store(archive, place / "store", on_error=on_error)
    except UserError:
        assert not (place / "store").exists()
        assert not (place / "store.partial").exists()
    else:
        assert verify_store(store.path) == []
        assert [digest.tobytes().hex() for digest in store.hashes()] == list(store.ids)


def test_the_miniature_becomes_5000_and_993_in_the_submissions_order(pcam_mini, tmp_path):
    store = prepare_store(pcam_mini, tmp_path / "store", workers=2)
    assert store.manifest.counts == {"train": {"normal": 3002, "tumour": 1998}, "test": {"unknown": 993}}
    with zipfile.ZipFile(pcam_mini) as archive:
        rows = archive.read("sample_submission.csv").decode().split()[1:]
    assert list(store.ids[5000:]) == [row.split(",")[0] for row in rows]
    assert list(store.ids[:5000]) == sorted(store.ids[:5000])
    assert [digest.tobytes().hex() for digest in store.hashes()] == list(store.ids)
