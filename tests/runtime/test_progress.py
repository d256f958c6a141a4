from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import sys
import termios

import pytest

from pcam_jax.runtime.progress import progress

SCRIPT = (
    "from pcam_jax.runtime.progress import progress\n"
    "with progress(10, 'counting', 'img', initial=2) as bar:\n"
    "    bar.update(8); bar.refresh()\n"
)


def test_it_is_silent_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(10, "counting", "img") as bar:
        bar.update(10)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar() -> None:
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    os.set_blocking(ours, False)
    try:
        subprocess.run([sys.executable, "-c", SCRIPT], stderr=theirs, check=True, timeout=60)
        shown = os.read(ours, 10000).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert "counting" in shown
    assert "10.0/10.0" in shown
    assert "img" in shown
