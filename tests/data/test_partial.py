"""A store in the making: what a stopped run leaves behind, and what the next one makes of it."""

import json
import os
import signal

import pytest
from kaggle_source import SHARD, KaggleSource, assert_holds, contents

from pcam_jax.data.convert import prepare_part, prepare_store
from pcam_jax.data.partial import PartialStore
from pcam_jax.runtime.errors import Interrupted, UserError


@pytest.fixture
def source(kaggle_folder) -> KaggleSource:
    return kaggle_folder(train=14, test=7)


def interrupt_after(chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send this process a SIGTERM once ``chunks`` chunks are logged."""
    note, logged = PartialStore.note, []

    def note_and_stop(self: PartialStore, outcome: object) -> None:
        note(self, outcome)
        logged.append(outcome)
        if len(logged) == chunks:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(PartialStore, "note", note_and_stop)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stopped_run_goes_on_to_the_same_bytes(source, tmp_path, monkeypatch, workers):
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


def test_what_the_log_promises_is_hashed_before_it_is_believed(source, tmp_path, monkeypatch):
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
    source, kaggle_folder, tmp_path, monkeypatch, change
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


def test_a_run_stopped_while_closing_gaps_goes_on(source, tmp_path, monkeypatch):
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


def test_two_runs_on_one_store_do_not_mix(source, tmp_path, monkeypatch):
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


def test_one_run_does_not_clear_away_running_parts(source, tmp_path, monkeypatch):
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
