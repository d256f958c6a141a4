from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pcam_jax.runtime.command import explain_os_error, run_command
from pcam_jax.runtime.errors import Interrupted, UserError


def leave(error: BaseException | None) -> Callable[[list[str]], None]:
    def main(argv: list[str]) -> None:
        if error is not None:
            raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (None, 0, ""),
        (UserError("No such store x: check it."), 2, "error: No such store x: check it.\n"),
        (Interrupted(signal.SIGTERM, "Saved."), 143, "Saved.\n"),
        (Interrupted(signal.SIGINT), 130, "Stopped.\n"),
        (KeyboardInterrupt(), 130, "Stopped.\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/x/y"),
            2,
            "error: Cannot read or write at /x/y: the disk is full; free some space, or choose a folder on "
            "another disk.\n",
        ),
        (
            FileExistsError(errno.EEXIST, "File exists", "/x"),
            2,
            "error: Cannot read or write at /x: a file of that name is in the way; choose another name, or "
            "move the file.\n",
        ),
    ],
)
def test_each_ending_has_its_code_and_one_sentence(
    error: BaseException | None, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leaving:
        run_command(leave(error), [])
    assert leaving.value.code == code
    assert capsys.readouterr().err == said


def test_running_out_of_memory_is_said_on_host_and_device(capsys: pytest.CaptureFixture[str]) -> None:
    class JaxRuntimeError(RuntimeError):
        pass

    for error in (
        MemoryError(),
        JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate"),
    ):
        with pytest.raises(SystemExit) as leaving:
            run_command(leave(error), [])
        assert leaving.value.code == 2
        assert "train.batch_size" in capsys.readouterr().err


@pytest.mark.parametrize("error", [KeyError("x"), OSError(errno.EDOM, "odd"), AssertionError()])
def test_a_bug_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        run_command(leave(error), [])


def test_every_explained_error_is_one_sentence() -> None:
    for number in errno.errorcode:
        sentence = explain_os_error(OSError(number, os.strerror(number), "/a/b"))
        if sentence is not None:
            assert sentence.startswith("Cannot read or write at /a/b: ")
            assert sentence.endswith(".")
            assert sentence.count(". ") == 0


def test_arguments_reach_the_verb() -> None:
    seen: list[list[str]] = []
    with pytest.raises(SystemExit):
        run_command(seen.append, ["a", "b"])
    assert seen == [["a", "b"]]


def in_process(body: str, **options: object) -> subprocess.Popen[bytes]:
    script = (
        f"from pcam_jax.runtime.command import run_command\ndef main(argv):\n    {body}\nrun_command(main)"
    )
    return subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


def test_sigterm_outside_any_loop_leaves_with_143() -> None:
    with in_process("import time; print('ready', flush=True); time.sleep(60)") as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.terminate()
        _, said = process.communicate(timeout=20)
        assert process.returncode == 143
        assert said == b"Stopped.\n"


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    with in_process("[print('x' * 1000) for _ in range(10000)]") as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr is not None
        said = process.stderr.read()
        assert process.wait(timeout=20) == 141
        assert said == b""


def test_importing_the_machine_room_does_not_import_jax() -> None:
    names = ("command", "errors", "files", "progress", "signals")
    script = (
        f"import sys; {'; '.join(f'import pcam_jax.runtime.{name}' for name in names)}; "
        "sys.exit('jax' in sys.modules)"
    )
    started = time.monotonic()
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2]).returncode == 0
    assert time.monotonic() - started < 60
