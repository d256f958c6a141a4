"""How much memory other processes hold."""

from __future__ import annotations

import shlex
import subprocess
import threading
import time
from pathlib import Path


class MemoryWatch(threading.Thread):
    """The most memory a process held that is its own, without mapped files (RssAnon), in MiB."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._status, self.highest = Path(f"/proc/{pid}/status"), 0.0

    def run(self) -> None:
        """Look until the process is gone."""
        while True:
            try:
                lines = self._status.read_text().splitlines()
            except (OSError, ProcessLookupError):
                return
            held = [int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon")]
            if not held:  # a zombie
                return
            self.highest = max(self.highest, *held)
            time.sleep(0.05)


def run_watched(command: list[str]) -> float:
    """Run a command to its end, its output thrown away; the most anonymous memory it held, in MiB.

    Raises:
        SystemExit: it failed.
    """
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    watch = MemoryWatch(process.pid)
    watch.start()
    if process.wait() != 0:
        raise SystemExit(f"{shlex.join(command)} ended with {process.returncode}")
    watch.join()
    return watch.highest
