from __future__ import annotations

import errno
import json
import os
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import recursive

from pcam_jax.runtime.errors import UserError
from pcam_jax.runtime.files import (
    atomic_write,
    folder_lock,
    remove_leftovers,
    sync_tree,
    write_json_atomic,
    write_text_atomic,
)

JSON = recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


def test_a_written_file_has_its_content_and_nothing_lies_beside_it(tmp_path: Path) -> None:
    write_text_atomic(tmp_path / "a.txt", "one\r\ntwo\né")
    assert (tmp_path / "a.txt").read_bytes() == "one\r\ntwo\né".encode()
    with atomic_write(tmp_path / "b.bin", "wb") as file:
        file.write(b"\0\1")
    assert (tmp_path / "b.bin").read_bytes() == b"\0\1"
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "b.bin"]


@given(value=JSON)
def test_json_comes_back(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    path = tmp_path_factory.mktemp("json") / "value.json"
    write_json_atomic(path, value)
    assert json.loads(path.read_text(encoding="utf-8")) == value


def test_the_old_file_stays_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text_atomic(path, "old")

    def write_and_fail() -> None:
        with atomic_write(path) as file:
            file.write("new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_and_fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text_atomic(tmp_path / "a.txt", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text_atomic(path, "old")
    script = (
        "import os, sys\n"
        "from pcam_jax.runtime.files import atomic_write\n"
        "with atomic_write(sys.argv[1]) as file:\n"
        "    file.write('new' * 10**6); file.flush(); os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, path])
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    (tmp_path / ".mine.tmp").write_text("")
    (tmp_path / ".gitignore").write_text("")
    assert len(os.listdir(tmp_path)) == 4
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".gitignore", ".mine.tmp", "a.txt"]


def test_a_file_beyond_the_limit_fails_and_leaves_nothing(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError) as failure:
            write_text_atomic(tmp_path / "a.txt", "x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert failure.value.errno == errno.EFBIG
    assert os.listdir(tmp_path) == []


def test_a_second_holder_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    with folder_lock(tmp_path, "a training run"):
        with pytest.raises(UserError) as refusal, folder_lock(tmp_path, "a training run"):
            pass
        assert str(tmp_path) in str(refusal.value)
        assert f"a training run (process {os.getpid()})" in str(refusal.value)
    with folder_lock(tmp_path, "a training run"):
        pass


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        "from pcam_jax.runtime.files import folder_lock\n"
        "with folder_lock(sys.argv[1], 'a test'):\n"
        "    print('held', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=f"process {holder.pid}"), folder_lock(tmp_path, "a test"):
            pass
        holder.kill()
        holder.wait()
        with folder_lock(tmp_path, "a test"):
            pass


def test_sync_tree_reaches_every_file(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/c").write_text("x")
    synced: list[str] = []
    real = os.fsync

    def record(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", record)
        sync_tree(tmp_path)
    assert {str(tmp_path / name) for name in ("", "a", "a/b", "a/b/c")} == {
        path.rstrip("/") for path in synced
    }
