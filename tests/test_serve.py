"""The service as a process: how it starts and ends, when it turns away, what it refuses to serve."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from kaggle_source import tif_bytes
from picture_files import encoded
from service import Service, form, read_reply

from pcam_jax.data.store import open_store
from pcam_jax.inference.predictor import Predictor
from pcam_jax.runtime.errors import UserError
from pcam_jax.serve import newest_run
from pcam_jax.web import api

Verb = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def images(tiny_store: Path) -> np.ndarray:
    return open_store(tiny_store).gather(np.arange(20))


def test_before_it_is_warm_it_says_so(tiny_run: Path, images: np.ndarray) -> None:
    with Service(tiny_run, "--batch-size", "256", wait=False) as service:
        assert service.get("/healthz").status == 200
        early = service.get("/readyz")
        refused = service.predict([("a", encoded(images[0]))])
        if early.status == 503:  # a fast machine may be warm by now
            assert early.json == {"status": "warming up"}
            assert int(early.headers["retry-after"]) > 0
        if refused.status == 503:
            assert "warming up" in refused.error
        service.said("Ready after")
        assert service.get("/readyz").status == 200
        assert service.predict([("a", encoded(images[0]))]).status == 200
        assert service.stop() == 143


def test_a_signal_while_warming_up_ends_it(tiny_run: Path) -> None:
    with Service(tiny_run, wait=False) as service:
        assert service.stop() == 143


def test_what_was_taken_is_answered_before_the_end(tiny_run: Path, images: np.ndarray) -> None:
    with Service(tiny_run) as service, contextlib.ExitStack() as open_ones:
        count = service.get("/model").json["limits"]["patches"] // (4 * 8)  # with their views they fit
        body, kind = form([(str(n), encoded(images[n % 20])) for n in range(count)])
        connections = [open_ones.enter_context(contextlib.closing(service.connect())) for _ in range(4)]
        for connection in connections:  # all but the last byte has been sent when the signal comes
            connection.putrequest("POST", "/predict?uncertainty=true")
            connection.putheader("Content-Type", kind)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders()
            connection.send(body[:-1])
        time.sleep(0.3)
        service.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert service.process.poll() is None
        for connection in connections:
            connection.send(body[-1:])
        replies = [read_reply(connection) for connection in connections]
        assert [reply.status for reply in replies] == [200] * 4
        assert [len(reply.json["results"]) for reply in replies] == [count] * 4
        assert service.process.wait(30) == 143
        with pytest.raises(OSError):
            service.get("/healthz")


def test_a_full_queue_turns_away_and_recovers(tiny_run: Path, images: np.ndarray) -> None:
    """Far more work than fits in the queue, at once: some is turned away, none is lost."""
    with Service(tiny_run, "--batch-size", "1") as service:
        capacity = service.get("/model").json["limits"]["patches"]
        files = [(str(n), encoded(images[n % 20])) for n in range(capacity // 8)]
        with ThreadPoolExecutor(8) as pool:
            replies = list(pool.map(lambda _: service.predict(files, "?uncertainty=true"), range(8)))
        counts = {status: sum(reply.status == status for reply in replies) for status in (200, 503)}
        assert sum(counts.values()) == 8, [reply.status for reply in replies]
        assert counts[200] >= 1
        assert counts[503] >= 1
        turned_away = next(reply for reply in replies if reply.status == 503)
        assert "busy" in turned_away.error
        assert 1 <= int(turned_away.headers["retry-after"]) <= 60
        assert service.predict(files[:2]).status == 200


def test_kill_and_restart_under_load(tiny_run: Path, images: np.ndarray) -> None:
    """Clients that try again get every answer, though the service is killed twice; nothing is left on disk."""
    before = sorted(path.relative_to(tiny_run) for path in tiny_run.rglob("*"))
    expected = Predictor.load(tiny_run)(images)
    done = threading.Event()
    current: list[Service] = []
    answered = [0]

    def client(seed: int) -> None:
        rng = np.random.default_rng(seed)
        while not done.is_set():
            row = int(rng.integers(len(images)))
            try:
                reply = current[-1].predict([("x", tif_bytes(images[row]))])
            except OSError:
                time.sleep(0.05)
                continue
            except Exception as error:  # half an answer
                if "IncompleteRead" not in type(error).__name__ and "HTTP" not in type(error).__name__:
                    raise
                continue
            if reply.status == 503:
                time.sleep(0.05)
                continue
            assert reply.status == 200, reply.body
            (result,) = api.Predictions(**reply.json).results
            assert abs(result.probability - expected[row]) < 1e-4
            answered[0] += 1

    with ThreadPoolExecutor(4) as pool, contextlib.ExitStack() as services:
        services.callback(done.set)
        current.append(services.enter_context(Service(tiny_run)))
        clients = [pool.submit(client, seed) for seed in range(4)]
        for _ in range(2):
            time.sleep(0.5)
            count = answered[0]
            assert count > 0
            current[-1].process.kill()
            current.append(services.enter_context(Service(tiny_run)))
            deadline = time.monotonic() + 20
            while answered[0] <= count + 20:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        done.set()
        for one in clients:
            one.result(30)
        assert current[-1].stop() == 143
    assert sorted(path.relative_to(tiny_run) for path in tiny_run.rglob("*")) == before


def test_the_newest_finished_run_is_served_by_default(tiny_run: Path, tmp_path: Path, verb: Verb) -> None:
    with pytest.raises(UserError, match=r"no finished run in .*runs/: make one with .*pcam_jax\.train"):
        newest_run(tmp_path / "runs")
    for number, name in enumerate(("old", "new", "unfinished")):
        copy = Path(shutil.copytree(tiny_run, tmp_path / "runs" / name))
        if name == "unfinished":
            (copy / "result.json").unlink()
        else:
            os.utime(copy / "result.json", (number, number))
    assert newest_run(tmp_path / "runs").name == "new"
    with Service(cwd=tmp_path) as service:
        assert service.get("/model").json["name"] == "new"
        assert service.stop() == 143


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{tmp}/none"], "There is no run"),
        (["{store}"], "is not a run made by"),
        (["{run}", "--tta", "d8"], "--tta is 'd8'"),
        (["{run}", "--port", "70000"], "--port is 70000"),
        (["{run}", "--port", "{used}"], "Cannot listen on 127.0.0.1 port"),
        (["{run}", "--host", "203.0.113.7"], "Cannot listen on 203.0.113.7"),
        (["{run}", "--threshold", "1.5"], "--threshold is 1.5"),
        (["{run}", "--root-path", "pcam"], "--root-path is 'pcam'"),
        (["{run}", "--token-file", "{tmp}/none"], "There is no token file"),
        (["{run}", "--token-file", "{short}"], "must be one word of at least 16"),
        (["{run}", "--batch-size", "0"], "must be at least 1"),
    ],
)
def test_mistakes_end_with_a_sentence(
    arguments: list[str],
    words: str,
    tiny_run: Path,
    tiny_store: Path,
    tmp_path: Path,
) -> None:
    from pcam_jax.serve import main

    (tmp_path / "short").write_text("secret")
    with socket.socket() as used:
        used.bind(("127.0.0.1", 0))
        used.listen()
        places = {
            "run": tiny_run,
            "store": tiny_store,
            "tmp": tmp_path,
            "used": used.getsockname()[1],
            "short": tmp_path / "short",
        }
        arguments = [argument.format(**places) for argument in arguments]
        if "--port" not in arguments:
            arguments += ["--port", "0"]
        with pytest.raises(UserError, match=words):
            main(arguments)


def test_a_mistake_from_the_command_line(verb: Verb, tmp_path: Path) -> None:
    done = verb("serve", tmp_path / "none", "--port", "0")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: There is no run")
    assert done.stderr.count("\n") == 1
