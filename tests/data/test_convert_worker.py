"""The processes that decode a source's images."""

import errno

import numpy as np
import pytest
from kaggle_source import KaggleSource, assert_holds

from pcam_jax.data import convert_worker
from pcam_jax.data.convert import prepare_store
from pcam_jax.data.convert_worker import Task, WorkerLost, convert, convert_chunk
from pcam_jax.data.raw import find_reader


@pytest.fixture
def source(kaggle_folder) -> KaggleSource:
    return kaggle_folder(train=14, test=7)


def test_a_killed_worker_is_said_and_the_work_is_kept(source, tmp_path, monkeypatch):
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


def test_a_full_disk_is_told_with_the_file(source):
    reader = find_reader(source.path)
    records, _ = reader.records()
    buffer = np.empty((2, *reader.image_shape), np.uint8)
    outcome = convert_chunk(reader, Task(0, 0, tuple(records[:2]), "/dev/full", 0), buffer)
    assert outcome.error == (errno.ENOSPC, "/dev/full")


@pytest.mark.parametrize("workers", [0, 2])
def test_every_task_has_one_outcome(source, tmp_path, workers):
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
