import csv
import errno
import json
import os
import shutil
import signal
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kaggle_source import KaggleSource, make_kaggle_folder

from pcam_jax.data.convert import prepare_part, prepare_store, report_path
from pcam_jax.data.convert_worker import Task, WorkerLost, convert, convert_chunk
from pcam_jax.data.integrity import verify_store
from pcam_jax.data.raw import find_reader
from pcam_jax.data.store import Store
from pcam_jax.runtime.errors import Interrupted, UserError

SHARD = 5


@pytest.fixture
def source(kaggle_folder) -> KaggleSource:
    return kaggle_folder(train=14, test=7)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def problems(store: Path) -> list[tuple[str, str]]:
    with open(report_path(store), newline="") as file:
        return [(row["problem"], row["id"]) for row in csv.DictReader(file)]


def assert_holds(store: Store, source: KaggleSource, left_out: tuple[str, ...] = ()) -> None:
    wanted = [name for name in [*source.train, *source.test] if name not in left_out]
    assert list(store.ids) == wanted
    assert list(store.labels) == [source.train.get(name, -1) for name in wanted]
    assert np.array_equal(store.gather(range(len(store))), [source.images[name] for name in wanted])
    assert verify_store(store.path) == []


def interrupt_after(chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send this process a SIGTERM once ``chunks`` chunks are logged."""
    from pcam_jax.data.partial import PartialStore

    note, logged = PartialStore.note, []

    def note_and_stop(self: PartialStore, outcome: object) -> None:
        note(self, outcome)
        logged.append(outcome)
        if len(logged) == chunks:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(PartialStore, "note", note_and_stop)


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


class TestRestart:
    @pytest.mark.parametrize("workers", [1, 2])
    def test_a_stopped_run_goes_on_to_the_same_bytes(self, source, tmp_path, monkeypatch, workers):
        whole = prepare_store(source.path, tmp_path / "whole", images_per_shard=SHARD)
        with monkeypatch.context() as patch:
            interrupt_after(2, patch)
            with pytest.raises(Interrupted) as caught:
                prepare_store(source.path, tmp_path / "store", images_per_shard=SHARD, workers=workers)
        assert caught.value.signum == signal.SIGTERM
        assert "goes on from there" in str(caught.value)
        partial = tmp_path / "store.partial"
        assert len((partial / "part-0-of-1/progress.jsonl").read_text().split()) >= 2
        assert not (tmp_path / "store").exists()
        told: list[str] = []
        kept = (partial / "store/images-00000.npy").stat().st_ino
        store = prepare_store(source.path, tmp_path / "store", images_per_shard=SHARD, notify=told.append)
        assert told == ["Going on where an earlier run stopped."]
        assert contents(store.path) == contents(whole.path)
        assert (store.path / "images-00000.npy").stat().st_ino == kept
        assert not partial.exists()

    def test_what_the_log_promises_is_hashed_before_it_is_believed(self, source, tmp_path, monkeypatch):
        with monkeypatch.context() as patch:
            interrupt_after(3, patch)
            with pytest.raises(Interrupted):
                prepare_store(source.path, tmp_path / "store", images_per_shard=SHARD)
        slots = tmp_path / "store.partial/store"
        with open(slots / "images-00000.npy", "r+b") as file:  # as a power loss may leave it
            file.seek(200)
            file.write(bytes(1000))
        (slots / "images-00001.npy").write_bytes(b"cut")
        (slots / "images-00002.npy").unlink()
        log = tmp_path / "store.partial/part-0-of-1/progress.jsonl"
        log.write_text(log.read_text() + '[15, "00ff\n[99999, "", []]\nnull\n[1,2,3]\n["a", "", [[1]]]')
        assert_holds(prepare_store(source.path, tmp_path / "store", images_per_shard=SHARD), source)

    @pytest.mark.parametrize("change", ["source", "settings", "plan"])
    def test_another_source_or_setting_starts_over_and_says_so(
        self, source, kaggle_folder, tmp_path, monkeypatch, change
    ):
        with monkeypatch.context() as patch:
            interrupt_after(2, patch)
            with pytest.raises(Interrupted):
                prepare_store(source.path, tmp_path / "store", images_per_shard=SHARD)
        per_shard = SHARD
        if change == "source":
            source = kaggle_folder(train=14, test=7, seed=5)
        elif change == "settings":
            per_shard = 4
        else:
            (tmp_path / "store.partial/plan.json").write_text(json.dumps({"a": 1}))
        told: list[str] = []
        store = prepare_store(source.path, tmp_path / "store", images_per_shard=per_shard, notify=told.append)
        assert_holds(store, source)
        assert "starting over" in told[0]

    def test_a_run_stopped_while_closing_gaps_goes_on(self, source, tmp_path, monkeypatch):
        bad = (list(source.train)[1], source.test[1])
        for name in bad:
            source.tif(name).write_bytes(b"")
        from pcam_jax.data import partial

        keep, calls = partial._keep_images, []

        def keep_once(*arguments: object) -> None:
            if calls:
                raise Interrupted(signal.SIGTERM)
            calls.append(keep(*arguments))

        with monkeypatch.context() as patch:
            patch.setattr(partial, "_keep_images", keep_once)
            with pytest.raises(Interrupted):
                prepare_store(source.path, tmp_path / "store", images_per_shard=SHARD, on_error="skip")
        assert calls
        store = prepare_store(source.path, tmp_path / "store", images_per_shard=SHARD, on_error="skip")
        assert_holds(store, source, bad)

    def test_two_runs_on_one_store_do_not_mix(self, source, tmp_path, monkeypatch):
        from pcam_jax.data.partial import PartialStore

        note = PartialStore.note
        refused: list[str] = []

        def note_and_try(self: PartialStore, outcome: object) -> None:
            monkeypatch.setattr(PartialStore, "note", note)
            for parts in (1, 2):  # the second has a plan and a lock of its own
                with pytest.raises(UserError) as caught:
                    prepare_part(source.path, tmp_path / "store", parts=parts)
                refused.append(str(caught.value))
            note(self, outcome)

        monkeypatch.setattr(PartialStore, "note", note_and_try)
        assert_holds(prepare_store(source.path, tmp_path / "store"), source)
        assert "in use by another prepare" in refused[0]
        assert "other settings" in refused[1]

    def test_one_run_does_not_clear_away_running_parts(self, source, tmp_path, monkeypatch):
        from pcam_jax.data.partial import PartialStore

        note = PartialStore.note

        def note_and_try(self: PartialStore, outcome: object) -> None:
            monkeypatch.setattr(PartialStore, "note", note)
            with pytest.raises(UserError, match="in use by another prepare"):
                prepare_store(source.path, tmp_path / "store", images_per_shard=SHARD)
            note(self, outcome)

        monkeypatch.setattr(PartialStore, "note", note_and_try)
        for part in range(2):
            store = prepare_part(source.path, tmp_path / "store", part=part, parts=2, images_per_shard=SHARD)
        assert_holds(store, source)


class TestWorkers:
    def test_a_killed_worker_is_said_and_the_work_is_kept(self, source, tmp_path, monkeypatch):
        from pcam_jax.data import convert_worker

        receive = convert_worker._Worker.receive

        def kill_then_receive(self: convert_worker._Worker) -> object:
            self._process.kill()
            self._process.wait()
            return receive(self)

        with monkeypatch.context() as patch:
            patch.setattr(convert_worker._Worker, "receive", kill_then_receive)
            with pytest.raises(WorkerLost, match="goes on where it stopped"):
                # both answers of a worker may be in the pipe already, so there are more than two a worker
                prepare_store(source.path, tmp_path / "store", images_per_shard=1, workers=2)
        assert (tmp_path / "store.partial").exists()
        assert_holds(prepare_store(source.path, tmp_path / "store", images_per_shard=1), source)

    def test_a_full_disk_is_told_with_the_file(self, source):
        reader = find_reader(source.path)
        records, _ = reader.records()
        buffer = np.empty((2, *reader.image_shape), np.uint8)
        outcome = convert_chunk(reader, Task(0, 0, tuple(records[:2]), "/dev/full", 0), buffer)
        assert outcome.error == (errno.ENOSPC, "/dev/full")

    @pytest.mark.parametrize("workers", [0, 2])
    def test_every_task_has_one_outcome(self, source, tmp_path, workers):
        reader = find_reader(source.path)
        records, _ = reader.records()
        path = tmp_path / "slots"
        path.touch()
        tasks = [
            Task(0, n, (record,), str(path), n * source.images[record.id].nbytes)
            for n, record in enumerate(records)
        ]
        outcomes = sorted(convert(reader, tasks, 1, workers, lambda: None), key=lambda outcome: outcome.start)
        assert [outcome.start for outcome in outcomes] == list(range(21))
        assert [outcome.hashes.hex() for outcome in outcomes] == [record.id for record in records]
        assert path.read_bytes() == b"".join(source.images[record.id].tobytes() for record in records)


def test_the_miniature_becomes_5000_and_993_in_the_submissions_order(pcam_mini, tmp_path):
    store = prepare_store(pcam_mini, tmp_path / "store", workers=2)
    assert store.manifest.counts == {"train": {"normal": 3002, "tumour": 1998}, "test": {"unknown": 993}}
    with zipfile.ZipFile(pcam_mini) as archive:
        rows = archive.read("sample_submission.csv").decode().split()[1:]
    assert list(store.ids[5000:]) == [row.split(",")[0] for row in rows]
    assert list(store.ids[:5000]) == sorted(store.ids[:5000])
    assert [digest.tobytes().hex() for digest in store.hashes()] == list(store.ids)
