from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from pcam_jax.runtime.errors import Interrupted
from pcam_jax.runtime.signals import StopSignals, termination_raises


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_request_that_check_honours(signum: int) -> None:
    before = signal.getsignal(signum)
    with StopSignals() as stop:
        stop.check()
        os.kill(os.getpid(), signum)
        wait_until(lambda: stop.requested)
        with pytest.raises(Interrupted) as interruption:
            stop.check()
    assert interruption.value.signum == signum
    assert signal.getsignal(signum) is before


def test_nested_use_shares_the_request() -> None:
    with StopSignals() as outer, StopSignals() as inner:
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: outer.requested)
        with pytest.raises(Interrupted):
            inner.check()


def test_a_new_block_starts_without_a_request() -> None:
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: stop.requested)
    with StopSignals() as stop:
        stop.check()


def test_outside_the_main_thread_nothing_is_requested() -> None:
    problems: list[BaseException] = []

    def work() -> None:
        try:
            with StopSignals() as stop, termination_raises():
                stop.check()
        except BaseException as error:
            problems.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not problems


def test_no_descriptor_or_thread_stays_behind() -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before, threads = descriptors(), threading.active_count()
    for _ in range(5):
        with StopSignals():
            pass
    wait_until(lambda: descriptors() <= before and threading.active_count() <= threads)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_process_at_once_inside_a_long_call(signum: int) -> None:
    # pbkdf2 gives the interpreter lock away and never looks at signals, as a long compilation does
    script = (
        "import hashlib\n"
        "from pcam_jax.runtime.signals import StopSignals\n"
        "with StopSignals():\n"
        "    print('ready', flush=True)\n"
        "    hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.2)
        process.send_signal(signum)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signum)
        assert process.wait(timeout=20) == 128 + signum


def test_termination_raises_where_nobody_polls() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted), termination_raises():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
