"""Several processes as one: joining, agreeing, sharing what the first one read, and ending together.

Every process runs the same program on its own devices and its own part of each batch. Only the first one
touches the run folder; what it reads or decides reaches the others from memory to memory, so that they need no
common disk but the store's.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from pcam_jax.runtime import command, sharding
from pcam_jax.runtime.errors import Interrupted, UserError
from pcam_jax.runtime.signals import StopSignals

T = TypeVar("T")

HEARTBEAT_SECONDS = 60
"""A process that cannot be heard for so long is taken for dead, and all stop."""
_JOIN_SECONDS = 300
_LEAVE_SECONDS = 3600  # the others wait while the first one draws and writes
_SHARE_SECONDS = 1800  # the first process may be reading a large checkpoint from a slow disk
_GONE = (
    "another process of this run has ended (its own output says why), so this one stops too; start all of them "
    "again, on fewer machines if need be, with --resume."
)

_state: dict[str, int] = {}  # "joined" once we are one of several, "shared" counts the values shared so far
_abort_handler: list[Any] = []  # the C side keeps no reference


def join() -> None:
    """Join the other processes of this run, if there are any; call before the first use of a device.

    Where the environment comes from:

    - ``JAX_COORDINATOR_ADDRESS`` (host:port of process 0), ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID``, all
      three, started by hand or by Kubernetes (``scripts/launch/``);
    - Slurm (``srun``) and Open MPI (``mpirun``) steps of several tasks, which `jax.distributed` reads itself.

    Otherwise this process is alone, and nothing happens.

    Raises:
        UserError: the environment is incomplete or contradictory, or the others do not come.
    """
    if _state or jax.distributed.is_initialized():
        return
    arguments = _environment()
    if arguments is None:
        return
    # JAX's own SIGTERM service would take over our handlers; `SharedStop` does its work
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=_JOIN_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_LEAVE_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [""])[0][:200].rstrip(".")
        raise UserError(f"The processes of this run cannot find each other: {reason}.") from None
    _state.update(joined=1, shared=0)
    command.farewells.append(_farewell)
    _speak_before_abort()
    if not is_first():
        # the same sentences from every process would be noise; errors still reach standard error
        sys.stdout.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _environment() -> dict[str, Any] | None:
    """Arguments of ``jax.distributed.initialize``, or None for a process on its own."""
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    by_launcher = any(_count(name) > 1 for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    if not given and not by_launcher:
        return None
    if by_launcher and set(given) <= {"JAX_COORDINATOR_ADDRESS"}:
        return {}  # jax.distributed reads the launcher's variables, and that address where it is set
    missing = [name for name in names if name not in given]
    if missing:
        raise UserError(
            f"{' and '.join(given)} {'is' if len(given) == 1 else 'are'} set but {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not: set all three, or none for a single process."
        )
    address = given["JAX_COORDINATOR_ADDRESS"]
    if not address.rpartition(":")[2].isdecimal() or ":" not in address:
        raise UserError(f"JAX_COORDINATOR_ADDRESS is {address!r}: it must be host:port of process 0.")
    count, number = _count("JAX_NUM_PROCESSES"), _count("JAX_PROCESS_ID")
    if not 0 <= number < count:
        raise UserError(
            f"JAX_PROCESS_ID is {given['JAX_PROCESS_ID']} of JAX_NUM_PROCESSES {given['JAX_NUM_PROCESSES']}: it "
            "must be a whole number from 0 to one below the number of processes."
        )
    arguments: dict[str, Any] = {"coordinator_address": address, "num_processes": count, "process_id": number}
    if not by_launcher:
        # nothing is left to find out; jax would look all the same, and in Kubernetes warn that it lacks a client
        arguments["cluster_detection_method"] = "deactivate"
    return arguments


def _count(name: str) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else -1


def is_first() -> bool:
    """Whether this process is the one that touches the run folder and speaks."""
    return jax.process_index() == 0


def share(value: Any) -> Any:
    """What the first process holds, on all of them; plain JSON values.

    Args:
        value: read from the first process only.

    Raises:
        UserError: the first process has ended.
    """
    if jax.process_count() == 1:
        return value
    client = _client()
    _state["shared"] += 1
    key = f"pcam_jax/shared/{_state['shared']}"
    if is_first():
        client.key_value_set(key, json.dumps(value))
        return value
    return json.loads(client.blocking_key_value_get(key, _SHARE_SECONDS * 1000))


def on_first(action: Callable[[], T]) -> T | None:
    """Do something on the first process alone.

    Returns:
        Its result there, None on the others.

    Raises:
        UserError: the first process's, on all of them.
    """
    result, sentence = None, None
    if is_first():
        try:
            result = action()
        except UserError as error:
            if jax.process_count() == 1:
                raise
            sentence = str(error)
    sentence = share(sentence)
    if sentence is not None:
        _state["agreed"] = 1
        raise UserError(sentence)
    return result


def share_arrays(arrays: dict[str, np.ndarray] | None) -> dict[str, np.ndarray] | None:
    """The first process's arrays by name, bit for bit on all of them; None where it has None."""
    if jax.process_count() == 1:
        return arrays
    described = None
    if is_first() and arrays is not None:
        described = [(name, array.dtype.str, array.shape) for name, array in arrays.items()]
    described = share(described)
    if described is None:
        return None
    shared = {}
    for name, dtype, shape in described:
        # as bytes: a sum of floats with zeros would lose the sign of a negative zero
        empty = np.zeros(int(np.prod(shape)) * np.dtype(dtype).itemsize, np.uint8)
        mine = empty if arrays is None else np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8)
        received = np.asarray(multihost_utils.broadcast_one_to_all(mine))
        shared[name] = received.view(dtype).reshape(shape)
    return shared


def gather_rows(rows: np.ndarray, counts: list[int]) -> np.ndarray:
    """The rows of all processes one after another, on each of them.

    Args:
        rows: ``[n, ...]`` of this process.
        counts: n of each process.
    """
    if jax.process_count() == 1:
        return rows
    padded = np.zeros((max(counts), *rows.shape[1:]), rows.dtype)
    padded[: len(rows)] = rows
    everyone = np.asarray(multihost_utils.process_allgather(padded))
    return np.concatenate([part[:count] for part, count in zip(everyone, counts, strict=True)])


class SharedStop:
    """`StopSignals` on which all processes agree: a signal to one of them stops all after the same step.

    Each `check` puts this process's signal into a sum over all of them, and looks at the sum that the check
    before it began; nobody waits, and all must check equally often.

    Args:
        stop: of this process.
        mesh: the devices of all processes.
    """

    def __init__(self, stop: StopSignals, mesh: Mesh) -> None:
        self._stop = stop
        self._alone = jax.process_count() == 1
        self._split = sharding.batch_sharding(mesh)
        self._largest = jax.jit(lambda signals: signals.max(), out_shardings=sharding.replicated(mesh))
        self._pending: jax.Array | None = None

    def check(self) -> None:
        """Raise if a stop was requested, on all processes alike.

        Raises:
            Interrupted: SIGINT or SIGTERM came to one of the processes.
        """
        if self._alone:
            self._stop.check()
            return
        mine = np.full(jax.local_device_count(), self._stop.requested or 0, np.int32)
        asked = self._largest(jax.make_array_from_process_local_data(self._split, mine))
        before, self._pending = self._pending, asked
        signum = int(before) if before is not None else 0
        if signum:
            _state["agreed"] = 1
            raise Interrupted(signum)


def _client() -> Any:
    # key-value store of the coordination service: no public name yet (jax 0.10 to 0.12)
    from jax._src.distributed import global_state

    return global_state.client


def _farewell(code: int, sentence: str | None, error: BaseException | None) -> None:
    """Leave a group of processes: together after success, at once and with a word after anything else."""
    if error is None or (isinstance(error, (Interrupted, UserError)) and "agreed" in _state):
        return  # all leave for the same reason, and jax waits at exit until they have come
    if sentence is None and _is_loss_of_another(error):
        sentence, code = f"error: {_GONE}", 2
    if sentence is None:
        sys.excepthook(type(error), error, error.__traceback__)
        sentence = f"error: process {jax.process_index()} of this run has failed."
    print(sentence, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without jax's exit barrier, at which the others would never arrive


def _is_loss_of_another(error: BaseException) -> bool:
    text = str(error)
    signs = (
        "Gloo",
        "NCCL",
        "coordination",
        "UNAVAILABLE",
        "ABORTED",
        "DEADLINE_EXCEEDED",
        "heartbeat",
        "Socket",
    )
    return type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError", "ValueError") and any(
        sign in text for sign in signs
    )


def _speak_before_abort() -> None:
    """Say our sentence where jax's C++ side ends the process because another one died.

    It logs and aborts from a thread of its own. The handler runs in that very thread, which ctypes lets take
    Python's lock since the main thread gives it away while it waits for devices.
    """

    def say(signum: int) -> None:
        os.write(2, f"error: {_GONE}\n".encode())
        os._exit(2)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(say)
    _abort_handler.append(handler)
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    libc.signal.restype = ctypes.c_void_p
    libc.signal(int(signal.SIGABRT), ctypes.cast(handler, ctypes.c_void_p))
