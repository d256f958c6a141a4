"""Stopping on request: finish the step, save, leave."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Protocol

from pcam_jax.runtime.errors import Interrupted


class Stop(Protocol):
    """What a long loop polls."""

    def check(self) -> None:
        """Raise Interrupted if a stop was requested."""


_HONOURED = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Turns the first SIGINT or SIGTERM into a request that loops poll; a second one ends the process at once.

    Use as a context manager around a loop. Nested use shares the outermost handlers, so that a command and
    the functions it calls may each guard themselves. Outside the main thread, where Python allows no
    handlers, nothing is ever requested.
    """

    _active: StopSignals | None = None

    def __init__(self) -> None:
        self._signum: int | None = None
        self._previous: dict[int, Any] = {}
        self._outer: StopSignals | None = None
        self._second: _SecondSignal | None = None

    def __enter__(self) -> StopSignals:
        if StopSignals._active is not None:
            self._outer = StopSignals._active
        elif threading.current_thread() is threading.main_thread():
            StopSignals._active = self
            self._second = _SecondSignal()
            for number in _HONOURED:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if StopSignals._active is self:
            StopSignals._active = None
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            if self._second is not None:
                self._second.close()

    @property
    def requested(self) -> int | None:
        """Number of the signal that came, or None."""
        return self._outer.requested if self._outer is not None else self._signum

    def check(self) -> None:
        """Raise if a stop was requested.

        Raises:
            Interrupted: SIGINT or SIGTERM came since the outermost block was entered.
        """
        if self.requested is not None:
            raise Interrupted(self.requested)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._signum is None:
            self._signum = signum


class _SecondSignal:
    """Ends the process at the second signal, also while the main thread is inside a long call.

    Python runs handlers between two bytecodes of the main thread, which a compilation of minutes keeps from
    coming; the wake-up descriptor is written by the C handler itself, and a thread of ours reads it.
    """

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._previous = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(self._reader,), name="signals", daemon=True).start()

    def close(self) -> None:
        """Restore the descriptor that was set before; the thread ends with its pipe."""
        signal.set_wakeup_fd(self._previous)
        os.close(self._writer)

    @staticmethod
    def _watch(reader: int) -> None:
        seen = 0
        try:
            while content := os.read(reader, 64):
                for signum in content:
                    if signum in _HONOURED:
                        seen += 1
                        if seen > 1:
                            os._exit(128 + signum)  # asked twice: no clean-up, the last save stands
        finally:
            os.close(reader)


@contextlib.contextmanager
def termination_raises() -> Iterator[None]:
    """SIGTERM raises Interrupted where no `StopSignals` is in charge, as SIGINT raises KeyboardInterrupt.

    For the time before and after the guarded loops, in which there is nothing to finish. Elsewhere than in the
    main thread it changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(signum: int, frame: FrameType | None) -> None:
        raise Interrupted(signum)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
