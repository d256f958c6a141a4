"""The verb `prepare` as a user runs it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from kaggle_source import KaggleSource, make_kaggle_folder

from pcam_jax.data.integrity import verify_store
from pcam_jax.data.store import open_store

COMMAND = [sys.executable, "-m", "pcam_jax.prepare"]
WITH_SMALL_FILES = [
    sys.executable,
    "-c",
    "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (10**7, 10**7)); "
    "os.execv(sys.argv[1], sys.argv[1:])",
]


def run(*arguments: object, through: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*through, *COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


def refusal(*arguments: object, through: Sequence[str] = ()) -> str:
    """The one sentence with which a command refuses."""
    done = run(*arguments, through=through)
    assert done.returncode == 2, done
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line


@pytest.fixture
def source(kaggle_folder) -> KaggleSource:
    return kaggle_folder()


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A zip of 2,100 patches: enough to be interrupted."""
    folder = make_kaggle_folder(tmp_path_factory.mktemp("large") / "set", 1800, 300)
    archive = folder.zip()
    shutil.rmtree(folder.path)
    return archive


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_prepares_verifies_and_says_what_comes_next(source, tmp_path):
    store = tmp_path / "store"
    done = run(source.path, store)
    assert done.returncode == 0, done
    assert "test: 5 without label" in done.stdout
    assert f"{store}: 17 images of 96x96" in done.stdout
    assert re.search(rf"Next: .*python.* -m pcam_jax\.train --data\.store {store}\n", done.stdout)
    assert done.stderr == ""  # no bar where there is no terminal
    again = run(source.path, store)
    assert again.returncode == 0
    assert "already prepared" in again.stderr
    verified = run("--verify", store)
    assert (verified.returncode, verified.stdout) == (
        0,
        f"{store} is sound: all 17 images match their SHA-1.\n",
    )


def test_neither_importing_nor_running_it_imports_jax(source, tmp_path):
    code = f"""
import sys, pcam_jax, pcam_jax.prepare
def heavy():
    return sorted({{'jax', 'jaxlib', 'flax', 'tensorflow', 'torch', 'pandas'}} & sys.modules.keys())
print(heavy())
made = [{str(source.path)!r}, {str(tmp_path / "a")!r}]
pcam_jax.prepare.main([*made, '--workers', '2', '--images-per-shard', '4'])
pcam_jax.prepare.main(['--verify', made[1]])
pcam_jax.prepare_store(made[0], {str(tmp_path / "b")!r})
print(heavy())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done
    assert [line for line in done.stdout.splitlines() if line.startswith("[")] == ["[]", "[]"]


def test_works_from_a_script_without_a_main_guard(source, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import pcam_jax\nprint('once')\n"
        f"store = pcam_jax.prepare_store({str(source.path)!r}, 'store', workers=2, images_per_shard=3)\n"
        "print(len(store))"
    )
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "once\n17\n"), done


def test_verify_names_the_shard_and_the_image_of_a_flipped_byte(source, tmp_path):
    store = tmp_path / "store"
    run(source.path, store, "--images-per-shard", 10)
    shard = store / "images-00000.npy"
    content = bytearray(shard.read_bytes())
    content[128 + 3 * 27_648 + 100] ^= 1
    shard.write_bytes(content)
    said = refusal("--verify", store)
    assert f"images-00000.npy: image {list(source.train)[3]} differs" in said


class TestMistakes:
    @pytest.mark.parametrize(
        ("name", "content", "said"),
        [
            ("none.zip", None, "There is no"),
            ("html.zip", b"<html>log in first</html>", "web page"),
            ("empty.zip", b"", "is empty"),
            ("cut.zip", "cut", "incomplete zip"),
            ("notes.txt", b"hello", "no known layout"),
        ],
    )
    def test_a_source_that_is_none(self, source, tmp_path, name, content, said):
        path = tmp_path / name
        if content == "cut":
            content = source.zip().read_bytes()[:30_000]
        if content is not None:
            path.write_bytes(content)
        sentence = refusal(path, tmp_path / "store")
        assert name in sentence
        assert said in sentence
        assert not list(tmp_path.glob("store*"))

    @pytest.mark.parametrize("fault", ["cut", "swapped", "missing", "label", "third", "duplicate"])
    def test_a_spoiled_set(self, source, tmp_path, fault):
        first, second = list(source.train)[:2]
        table = source.path / "train_labels.csv"
        tif, culprit = source.tif(first), first
        if fault == "cut":
            tif.write_bytes(tif.read_bytes()[:9000])
        elif fault == "swapped":
            shutil.copy(source.tif(second), tif)
        elif fault == "missing":
            tif.unlink()
        elif fault == "label":
            table.write_text(table.read_text().replace("label", "klass", 1))
            culprit = "label"
        elif fault == "third":
            table.write_text(table.read_text().replace(f"{first},{source.train[first]}", f"{first},2"))
        else:
            table.write_text(table.read_text() + f"{first},{source.train[first]}\n")
        assert culprit in refusal(source.path, tmp_path / "store")
        left = [name for name in names(tmp_path) if name.startswith("store")]
        assert left in ([], ["store.prepare_report.csv"])
        if fault in ("cut", "swapped"):
            assert run(source.path, tmp_path / "store", "--on-error", "skip").returncode == 0
            assert first not in open_store(tmp_path / "store").ids

    @pytest.mark.parametrize(
        "options",
        [
            ["--workers", "0"],
            ["--workers", "many"],
            ["--reader", "h6"],
            ["--shard", "2/2"],
            ["--shard", "half"],
            ["--on-error", "ignore"],
            ["--images-per-shard", "-1"],
            ["--no-such-option"],
        ],
        ids=" ".join,
    )
    def test_an_impossible_option(self, source, tmp_path, options):
        done = run(source.path, tmp_path / "store", *options)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert any(word.lstrip("-").replace("-", "_") in done.stderr.replace("-", "_") for word in options)
        assert not list(tmp_path.glob("store*"))

    def test_too_few_or_many_arguments(self, source):
        for arguments in ([], [source.path], ["--verify"], [source.path, "a", "b"], ["--verify", "a", "b"]):
            assert run(*arguments).returncode == 2

    def test_verifying_what_is_no_store(self, tmp_path):
        assert "There is no store" in refusal("--verify", tmp_path / "none")
        assert "is not a store" in refusal("--verify", tmp_path)


class TestDisk:
    def test_too_little_room_is_said_before_it_starts(self, large, tmp_path):
        with small_disk(tmp_path / "disk", "20m") as disk:
            sentence = refusal(large, disk / "store")
            assert "The store needs 60 MB" in sentence  # 58 of pixels, and the tables
            assert "free some space" in sentence
            assert names(disk) == []

    def test_a_disk_that_fills_up_meanwhile(self, large, tmp_path):
        with small_disk(tmp_path / "disk", "150m") as disk:
            process = start(large, disk / "store")
            wait_for_progress(disk / "store", process)
            os.killpg(process.pid, signal.SIGSTOP)  # else it may end before the disk is full
            with open(disk / "filler", "wb") as filler:
                try:
                    while True:
                        filler.write(bytes(2**20))
                        filler.flush()
                except OSError:
                    pass
            os.killpg(process.pid, signal.SIGCONT)
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 2, errors
            assert "the disk is full" in errors
            assert "Traceback" not in errors
            assert names(disk) == ["filler"]

    @pytest.mark.parametrize("workers", [1, 2])
    def test_a_file_size_limit(self, large, tmp_path, workers):
        # set by a process between, since forking this one is unsafe once a test has imported jax
        sentence = refusal(large, tmp_path / "store", "--workers", workers, through=WITH_SMALL_FILES)
        assert "store" in sentence
        assert names(tmp_path) == []


class small_disk:  # noqa: N801
    """A tmpfs of a size, where this user may mount one."""

    def __init__(self, path: Path, size: str) -> None:
        path.mkdir()
        self.path = path
        self.size = size

    def __enter__(self) -> Path:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={self.size}", "none", self.path], capture_output=True
        )
        if mounted.returncode:
            pytest.skip("mounting a tmpfs is not permitted here; the file-size limit is tested instead")
        return self.path

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", self.path], check=True)


def start(source: Path, store: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, str(source), str(store), *options],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # a group of its own, workers included
    )


def wait_for_progress(store: Path, process: subprocess.Popen[str], lines: int = 1) -> None:
    log = store.with_name(store.name + ".partial") / "part-0-of-1/progress.jsonl"
    deadline = time.monotonic() + 60
    while not log.exists() or log.read_bytes().count(b"]\n") < lines:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture(scope="module")
def whole(large, tmp_path_factory) -> dict[str, bytes]:
    """The files of the large set's store."""
    store = tmp_path_factory.mktemp("whole") / "store"
    assert run(large, store, "--images-per-shard", 700).returncode == 0
    return {path.name: path.read_bytes() for path in store.iterdir()}


class TestInterrupted:
    @pytest.mark.parametrize(
        ("number", "workers", "code"),
        [(signal.SIGKILL, 1, -9), (signal.SIGKILL, 2, -9), (signal.SIGTERM, 1, 143), (signal.SIGINT, 2, 130)],
    )
    def test_the_same_command_goes_on_to_the_same_bytes(self, large, whole, tmp_path, number, workers, code):
        store = tmp_path / "store"
        options = ["--images-per-shard", "700", "--workers", str(workers)]
        process = start(large, store, *options)
        wait_for_progress(store, process, lines=2)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == code, errors
        assert "Traceback" not in errors
        if code > 0:
            assert "the same command goes on from there" in errors
        assert names(tmp_path) == ["store.partial"]
        slots = store.with_name("store.partial") / "store/images-00000.npy"
        kept = slots.stat().st_ino
        done = run(large, store, *options)
        assert done.returncode == 0, done
        assert "Going on where an earlier run stopped" in done.stderr
        assert {path.name: path.read_bytes() for path in store.iterdir()} == whole
        assert (store / "images-00000.npy").stat().st_ino == kept
        assert names(tmp_path) == ["store"]

    def test_killed_again_and_again_it_still_ends(self, large, whole, tmp_path):
        store = tmp_path / "store"
        rng = np.random.default_rng(0)
        for _ in range(5):
            process = start(large, store, "--images-per-shard", "700")
            time.sleep(rng.uniform(0.1, 0.7))
            process.kill()
            process.communicate()
            assert set(names(tmp_path)) <= {"store.partial", "store"}
            if store.exists():
                assert verify_store(store) == []
        assert run(large, store, "--images-per-shard", 700).returncode == 0
        assert {path.name: path.read_bytes() for path in store.iterdir()} == whole

    def test_workers_end_with_their_parent(self, large, tmp_path):
        process = start(large, tmp_path / "store", "--workers", "2")
        wait_for_progress(tmp_path / "store", process)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 2
        process.kill()
        process.communicate()
        deadline = time.monotonic() + 20
        while any(_is_alive(int(child)) for child in children):
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def test_parts_run_side_by_side(self, large, whole, tmp_path):
        store = tmp_path / "store"
        parts = [start(large, store, "--images-per-shard", "700", "--shard", f"{n}/3") for n in range(3)]
        for process in parts:
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 0, errors
        assert {path.name: path.read_bytes() for path in store.iterdir()} == whole
        assert names(tmp_path) == ["store"]


def _is_alive(number: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{number}/status").read_text()
    except FileNotFoundError:
        return False


def test_memory_does_not_grow_with_the_set(large, tmp_path):
    """58 MB of pixels are prepared with far less anonymous memory than that above the interpreter's own."""
    code = (
        "import resource, sys\nfrom pcam_jax.data.convert import prepare_store\nimport pandas\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"prepare_store({str(large)!r}, {str(tmp_path / 'store')!r}, workers=1)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done
    assert int(done.stdout) < 40_000  # KiB


def test_the_sample_is_a_source(tmp_path):
    done = run("sample", tmp_path / "store", "--count", 16, "--seed", 3)
    assert done.returncode == 0, done
    store = open_store(tmp_path / "store")
    assert (len(store), sum(store.splits == "test")) == (18, 2)
    again = run("sample", tmp_path / "store", "--count", 16, "--seed", 3)
    assert (again.returncode, "already" in again.stderr) == (0, True), again
    assert "exists already" in refusal("sample", tmp_path / "store", "--count", 16, "--seed", 4)
    assert "at least one" in refusal("sample", tmp_path / "other", "--count", 0)


def test_a_zip_is_read_in_place(source, tmp_path):
    archive = source.zip(zipfile.ZIP_STORED)
    shutil.rmtree(source.path)
    assert run(archive, tmp_path / "store").returncode == 0
    assert names(tmp_path) == [archive.name, "store"]
    assert os.path.getsize(tmp_path / "store/images-00000.npy") == 128 + 17 * 27_648
