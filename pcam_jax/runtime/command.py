"""How every verb starts and ends: exit codes and one-sentence errors."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable
from typing import NoReturn

from pcam_jax.runtime.errors import Interrupted, UserError
from pcam_jax.runtime.signals import termination_raises

_ADVICE = {
    errno.ENOSPC: "the disk is full; free some space, or choose a folder on another disk",
    errno.EDQUOT: "your disk quota is used up; free some space, or choose a folder on another disk",
    errno.EFBIG: "the file grew past the largest size allowed here; raise the limit, or choose another disk",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.EACCES: "permission denied; choose another folder, or change its permissions",
    errno.EPERM: "permission denied; choose another folder, or change its permissions",
    errno.EEXIST: "a file of that name is in the way; choose another name, or move the file",
    errno.ENOTDIR: "part of that path is a file, not a folder; choose another folder",
    errno.EISDIR: "it is a folder where a file is wanted; choose another name",
    errno.ENAMETOOLONG: "the name is too long for the file system; choose a shorter one",
    errno.ELOOP: "its symbolic links lead in a circle; choose another path",
    errno.ENOENT: "it does not exist (any more); check the path",
    errno.ESTALE: "the network folder is gone; mount it again, then repeat the command",
    errno.ENOTCONN: "the network folder is not connected; mount it again, then repeat the command",
    errno.EMFILE: "too many open files; raise the limit with `ulimit -n`",
    errno.EIO: "the disk reports an input/output error; check it before you go on",
}


Farewell = Callable[[int, str | None, BaseException | None], None]
farewells: list[Farewell] = []
"""Called last, with the exit code, the sentence to print (None for a bug) and the error that ended the command."""


def run_command(main: Callable[[list[str]], None], argv: list[str] | None = None) -> NoReturn:
    """Run a verb and leave with its exit code.

    0 done; 2 the user's mistake or the machine's limit (disk or memory full, no permission), said in one
    sentence on standard error without a traceback; 130 or 143 stopped by SIGINT or SIGTERM. Anything else is a
    bug and shows its traceback with exit code 1.

    Args:
        main: takes the arguments after the verb.
        argv: those arguments; by default the process's.
    """
    code: int = 0
    sentence: str | None = ""
    failure: BaseException | None = None
    try:
        with termination_raises():
            main(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        failure, (code, sentence) = error, outcome(error)
    for farewell in farewells:
        farewell(code, sentence, failure)
    if failure is not None and sentence is None:
        raise failure
    if sentence:
        print(sentence, file=sys.stderr)
    sys.exit(code)


def outcome(error: BaseException) -> tuple[int, str | None]:
    """Exit code and sentence for what ended a command; None instead of a sentence for a bug."""
    if isinstance(error, UserError):
        return 2, f"error: {error}"
    if isinstance(error, Interrupted):
        return 128 + error.signum, str(error) or "Stopped."
    if isinstance(error, KeyboardInterrupt):
        return 130, "Stopped."
    if isinstance(error, BrokenPipeError):
        # the reader of our output went away (`| head`): not our fault and not worth a traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141, ""
    if isinstance(error, OSError) and (explained := explain_os_error(error)) is not None:
        return 2, f"error: {explained}"
    if isinstance(error, MemoryError) or _is_device_memory(error):
        return 2, (
            "error: Out of memory: take a smaller train.batch_size (or train.eval_batch_size), a smaller network, "
            'or data.placement = "host".'
        )
    return 1, None


def python_command() -> str:
    """What to type for this Python: `python`, or its path where a virtual environment is not activated."""
    if sys.prefix == sys.base_prefix:
        return "python"
    found = shutil.which("python")
    here = os.path.dirname(os.path.abspath(sys.executable))
    if found is not None and os.path.dirname(os.path.abspath(found)) == here:
        return "python"
    path = os.path.join(here, "python")
    return os.path.relpath(path) if path.startswith(os.path.join(os.getcwd(), "")) else path


def explain_os_error(error: OSError) -> str | None:
    """One sentence for an operating-system error that a person can mend, or None for others."""
    advice = _ADVICE.get(error.errno or 0)
    if advice is None:
        return None
    where = f" at {error.filename}" if error.filename else ""
    return f"Cannot read or write{where}: {advice}."


def _is_device_memory(error: BaseException) -> bool:
    """Whether XLA could not allocate (told by name: this module must not import jax)."""
    text = str(error)
    return type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and (
        "RESOURCE_EXHAUSTED" in text or "Out of memory" in text
    )
