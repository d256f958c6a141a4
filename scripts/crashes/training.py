"""A training process: followed by its progress bar, ended by a signal when a moment has come."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import re
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Fault:
    """A way to end a process, and how to tell its moment."""

    name: str
    signum: int
    has_come: Callable[[Training], bool]


@dataclasses.dataclass
class Life:
    """One process from its start to its end."""

    fault: str
    exit_code: int
    seconds_to_first_step: float
    first_step: int
    last_step: int
    saved_step: int
    lost_seconds: float
    left_behind: list[str]
    said: str
    recovered_seconds: float | None = None
    """From the start of the next process to its first new step; None if none was asked for."""

    @property
    def lost_steps(self) -> int:
        """Steps that were done and must be done again."""
        return max(0, self.last_step - self.saved_step)


class Training:
    """A training process, its progress bar and its folder."""

    def __init__(self, command: Sequence[str | Path], run: Path, examples: int, batch_size: int) -> None:
        self.run, self._examples, self._batch_size = run, examples, batch_size
        self.checkpoints = run / "checkpoints"
        self.saved_at_start = latest_step(run)
        self.step, self.first_step, self.evaluating = self.saved_at_start, 0, False
        self.seconds_to_first_step = 0.0
        self._started = time.monotonic()
        ours, theirs = os.openpty()  # a terminal, so that it draws its bar
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 200, 0, 0))
        environment = {**os.environ, "TQDM_MININTERVAL": "0", "TQDM_MINITERS": "1"}
        self.process = subprocess.Popen(
            [*map(str, command)],
            stdout=subprocess.DEVNULL,
            stderr=theirs,
            env=environment,
            start_new_session=True,
        )
        os.close(theirs)
        self._terminal, self._shown = ours, b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while content := os.read(self._terminal, 1 << 16):
                self._shown += content
                bars = re.findall(rb"epoch (\d+):[^\r\n]*? ([\d.]+)/([\d.]+) \[", self._shown)
                if bars:
                    epoch, done, total = (int(float(number)) for number in bars[-1])
                    self._shown = self._shown[-4000:]
                    self._follow(epoch, done, total)

    def _follow(self, epoch: int, done: int, total: int) -> None:
        last = -(-epoch * self._examples // self._batch_size)
        step = last - (total - done) // self._batch_size
        if done and not self.first_step:
            self.first_step, self.seconds_to_first_step = step, time.monotonic() - self._started
        self.step, self.evaluating = max(self.step, step), done == total

    def names(self) -> list[str]:
        """What lies in the folder of checkpoints."""
        with contextlib.suppress(FileNotFoundError):
            return os.listdir(self.checkpoints)
        return []

    def end(self, fault: Fault) -> Life:
        """Wait for the moment, send the signal, and look at what is left; a finished run has exit code 0."""
        while self.process.poll() is None and not (self.first_step and fault.has_come(self)):
            time.sleep(0.0002)
        killed = time.time()
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(fault.signum)
        code = self.process.wait(timeout=300)
        self._reader.join(timeout=10)
        os.close(self._terminal)
        saved = latest_step(self.run)
        folder = self.checkpoints / str(saved)
        since = folder.stat().st_ctime if folder.is_dir() else killed - self.seconds_to_first_step
        lines = self._shown.decode(errors="replace").replace("\r", "\n").splitlines()
        # what the bar leaves of itself is no sentence
        plain = [line.strip() for line in lines if re.match(r"[A-Z][a-z]+ |error: ", line.strip())]
        return Life(
            fault.name,
            code,
            self.seconds_to_first_step,
            self.first_step,
            self.step,
            saved,
            max(0.0, killed - since),
            sorted(re.sub(r"\d+", "N", name) for name in self.names() if name.endswith(".tmp")),
            plain[-1] if plain else "",
        )


def latest_step(run: Path) -> int:
    """Step of the latest complete checkpoint, or 0."""
    folder = run / "checkpoints"
    names = os.listdir(folder) if folder.is_dir() else []
    return max((int(name) for name in names if name.isdecimal()), default=0)
