"""Serve: ``python -m pcam_jax.serve [RUN...]`` answers over HTTP, with a page for people."""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import tyro

from pcam_jax.runtime.command import python_command, run_command
from pcam_jax.runtime.errors import Interrupted, UserError, require

LOOPBACK = ("127.0.0.1", "::1", "localhost")
_TOKEN = "PCAM_JAX_TOKEN"
_SHORTEST_TOKEN = 16
_STOPPED = "Stopped; all requests that were taken are answered."


@dataclasses.dataclass(frozen=True)
class ServeCommand:
    """Answer over HTTP what a trained run says of pictures, with a page for people. Research use only."""

    paths: tyro.conf.Positional[tuple[Path, ...]] = ()
    """One or more runs or exported models (several give their mean); by default the newest finished run in runs/."""
    host: str = "127.0.0.1"
    """Address to listen on; the default is reached from this machine alone."""
    port: int = 8000
    """Port; 0 takes a free one."""
    tta: Annotated[str, tyro.conf.arg(metavar="{none,d4}")] = "none"
    """d4 averages every probability over the eight symmetries of the square, at eight times the work."""
    threshold: float | None = None
    """Decide at this probability instead of the run's own threshold."""
    batch_size: int = 64
    """Most patches the device takes at once."""
    root_path: str = ""
    """Prefix under which a reverse proxy offers the service, such as /pcam."""
    allow_host: tuple[str, ...] = ()
    """Further names under which the service may be asked, for a reverse proxy that passes its own on."""
    token_file: Path | None = None
    """File with a token that every request must bring as `Authorization: Bearer TOKEN`; or set PCAM_JAX_TOKEN."""
    max_pixels: int = 4096 * 4096
    """Most pixels of one picture."""
    access_log: bool = False
    """Print a line for each request (never the names of files)."""
    grace_seconds: int = 30
    """Longest wait at the end for requests that are under way."""


def main(argv: list[str]) -> None:
    """Parse the command line and serve until a signal comes."""
    command = tyro.cli(ServeCommand, args=argv, prog="python -m pcam_jax.serve")
    for module in ("fastapi", "uvicorn", "python_multipart"):
        require(module, "serve")
    if command.tta not in ("none", "d4"):
        raise UserError(f"--tta is {command.tta!r}: it must be none or d4.")
    if command.batch_size < 1 or command.max_pixels < 1 or command.grace_seconds < 1:
        raise UserError("--batch-size, --max-pixels and --grace-seconds must be at least 1.")
    root_path = command.root_path.rstrip("/")
    if root_path and not root_path.startswith("/"):
        raise UserError(f"--root-path is {command.root_path!r}: it begins with a slash, such as /pcam.")
    token = read_token(command.token_file)
    paths = list(command.paths) or [newest_run(Path("runs"))]
    with listen(command.host, command.port) as listener:
        _serve(command, paths, token, root_path, listener)


def _serve(
    command: ServeCommand, paths: list[Path], token: str, root_path: str, listener: socket.socket
) -> None:
    import uvicorn

    from pcam_jax.web.app import create_app
    from pcam_jax.web.guard import LOCAL_HOSTS
    from pcam_jax.web.limits import Limits
    from pcam_jax.web.metrics import Metrics
    from pcam_jax.web.model import ServedModel
    from pcam_jax.web.service import Service

    metrics = Metrics()
    model = ServedModel(
        paths,
        tta=command.tta,
        threshold=command.threshold,
        largest_batch=command.batch_size,
        observe=metrics.observe_batch,
    )
    for remark in model.remarks:
        print(f"Warning: {remark}.")
    local = command.host in LOOPBACK
    if not local and not token:
        print("Warning: anyone who reaches this address can use the service: set a token with --token-file.")
    limits = dataclasses.replace(
        Limits(), pixels=command.max_pixels, request_pixels=max(Limits().request_pixels, command.max_pixels)
    )
    service = Service(model, metrics, limits, token_needed=bool(token))
    hosts = (
        [*LOCAL_HOSTS, *(name.lower() for name in command.allow_host)] if local or command.allow_host else []
    )
    app = create_app(service, token=token, hosts=hosts, root_path=root_path)
    signals: list[int] = []

    class Server(uvicorn.Server):
        """Remembers a signal: that uvicorn raises it again once it has closed did not end every process with it."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            signals.append(sig)
            super().handle_exit(sig, frame)

    server = Server(
        uvicorn.Config(
            app,
            log_level="info" if command.access_log else "warning",
            access_log=command.access_log,
            server_header=False,
            ws="none",
            timeout_keep_alive=30,
            timeout_graceful_shutdown=command.grace_seconds,
            h11_max_incomplete_event_size=16 * 1024,
        )
    )
    address = f"http://{_shown(command.host)}:{listener.getsockname()[1]}{root_path}/"
    warming = threading.Thread(target=_warm_up, args=(service, server, address), name="warm-up", daemon=True)
    print(f"Serving {', '.join(model.names)} on {address} (research use only); warming up.", flush=True)
    warming.start()
    try:
        server.run(sockets=[listener])
        if signals:
            raise Interrupted(signals[0])
    except (Interrupted, KeyboardInterrupt) as stopped:
        warming.join(command.grace_seconds)
        if isinstance(stopped, Interrupted):
            raise Interrupted(stopped.signum, _STOPPED) from None
        raise
    finally:
        service.begin_closing()
    if service.failure is not None:
        raise service.failure


def newest_run(folder: Path) -> Path:
    """The run in a folder that finished last.

    Raises:
        UserError: there is none.
    """
    from pcam_jax.run.folder import CONFIG, RESULT

    finished = [path.parent for path in folder.glob(f"*/{RESULT}") if (path.parent / CONFIG).is_file()]
    if not finished:
        raise UserError(
            f"There is no finished run in {folder}/: make one with `{python_command()} -m pcam_jax.train`, or name "
            f"a run as in `{python_command()} -m pcam_jax.serve RUN`."
        )
    return max(finished, key=lambda path: (path / RESULT).stat().st_mtime_ns)


def read_token(path: Path | None) -> str:
    """The token of a file, or of the environment, or "".

    Raises:
        UserError: the file is missing or holds no usable token.
    """
    where, token = (str(path), "") if path is not None else (_TOKEN, os.environ.get(_TOKEN, ""))
    if path is not None:
        try:
            token = path.read_text(encoding="ascii")
        except FileNotFoundError:
            raise UserError(f"There is no token file {path}: write a long random word into it.") from None
        except UnicodeDecodeError:
            raise UserError(
                f"The token in {path} holds other characters than ASCII: write another."
            ) from None
    token = token.strip()
    if path is None and not token:
        return ""
    if len(token) < _SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(f"The token in {where} must be one word of at least {_SHORTEST_TOKEN} characters.")
    return token


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to an address, so that a port in use is known before anything is loaded.

    Raises:
        UserError: the port is in use or not allowed, or there is no such address here.
    """
    if not 0 <= port <= 65535:
        raise UserError(f"--port is {port}: a port lies between 0 and 65535.")
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, UnicodeError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"Cannot listen on {host} port {port} ({reason}): choose with --host and --port."
        ) from None
    listener.listen(128)
    return listener


def _warm_up(service: Any, server: Any, address: str) -> None:
    started = time.monotonic()
    try:
        if service.warm_up():
            print(f"Ready after {time.monotonic() - started:.1f} s: {address}", flush=True)
    except BaseException as error:  # told by the main thread, as the command's own failure
        logging.getLogger(__name__).debug("warm-up failed", exc_info=True)
        service.failure = error
        server.should_exit = True


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


if __name__ == "__main__":
    run_command(main)
