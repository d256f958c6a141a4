"""The service as a process: what it answers, when it turns away, how it starts and ends."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kaggle_source import tif_bytes
from PIL import Image
from service import Reply, Service, form, read_reply

from pcam_jax.data.store import open_store
from pcam_jax.inference.predictor import Predictor
from pcam_jax.run.operating_point import OperatingPoint, write_operating_point
from pcam_jax.runtime.errors import UserError
from pcam_jax.serve import newest_run
from pcam_jax.web import api
from pcam_jax.web.model import ServedModel

Verb = Callable[..., subprocess.CompletedProcess[str]]


def encoded(pixels: np.ndarray, kind: str = "png", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def probabilities(reply: Reply) -> list[float]:
    assert reply.status == 200, reply.body
    return [result["probability"] for result in api.Predictions(**reply.json).model_dump()["results"]]


@pytest.fixture(scope="module")
def images(tiny_store: Path) -> np.ndarray:
    return open_store(tiny_store).gather(np.arange(20))


@pytest.fixture(scope="module")
def service(tiny_run: Path) -> Iterator[Service]:
    with Service(tiny_run) as running:
        yield running
        assert running.process.poll() is None
        assert running.stop() == 143
        assert running.errors == ["Stopped; all requests that were taken are answered.\n"]


def test_probabilities_are_those_of_the_predictor(
    service: Service, images: np.ndarray, tiny_run: Path
) -> None:
    expected = Predictor.load(tiny_run)(images)
    files = [(f"p{number}.tif", tif_bytes(image)) for number, image in enumerate(images)]
    reply = service.predict(files)
    np.testing.assert_allclose(probabilities(reply), expected, rtol=1e-4)
    assert [result["name"] for result in reply.json["results"]] == [name for name, _ in files]
    threshold = reply.json["threshold"]
    for result in reply.json["results"]:
        assert result["class"] == (result["probability"] >= threshold)
        assert result["decision"] == f"class{result['class']}"
        assert sum(result["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert result["kind"] == "patch"
        assert result["uncertainty"] is None
        assert result["heat_map"] is None


def test_tif_png_and_zip_give_the_same(service: Service, images: np.ndarray) -> None:
    whole = {
        "deep/a.png": encoded(images[0]),
        "b.tif": tif_bytes(images[1]),
        "__MACOSX/._b.tif": b"x",
        ".DS_Store": b"x",
    }
    reply = service.predict([("both.zip", zipped(whole)), ("c.png", encoded(images[2]))])
    assert [result["name"] for result in reply.json["results"]] == ["a.png", "b.tif", "c.png"]
    alone = [service.predict([("x", tif_bytes(image))]) for image in images[:3]]
    np.testing.assert_allclose(
        probabilities(reply), [probabilities(one)[0] for one in alone], rtol=1e-4, atol=1e-6
    )
    names = service.predict([("wrong-name.gif", encoded(images[0], "jpeg", quality=95))])
    assert probabilities(names)[0] == pytest.approx(probabilities(alone[0])[0], abs=0.1)


def test_uncertainty_tells_of_all_symmetries(service: Service, images: np.ndarray, tiny_run: Path) -> None:
    predictor = Predictor.load(tiny_run)
    files = [(str(number), encoded(image)) for number, image in enumerate(images[:3])]
    reply = service.predict(files, "?uncertainty=true")
    np.testing.assert_allclose(probabilities(reply), predictor(images[:3]), rtol=1e-4)
    turned = [
        view
        for flipped in (images[:3], images[:3, :, ::-1])
        for view in (np.rot90(flipped, turns, (1, 2)) for turns in range(4))
    ]
    views = np.stack([predictor(np.ascontiguousarray(view)) for view in turned])
    for number, result in enumerate(reply.json["results"]):
        told = result["uncertainty"]
        assert told["views"] == 8
        assert told["lowest"] == pytest.approx(views[:, number].min(), rel=1e-4)
        assert told["highest"] == pytest.approx(views[:, number].max(), rel=1e-4)
        assert told["standard_deviation"] == pytest.approx(views[:, number].std(), rel=1e-3, abs=1e-6)
        sides = views[:, number] >= reply.json["threshold"]
        assert told["agrees"] == (sides.all() or not sides.any())


def test_heat_maps_are_those_of_explain(service: Service, images: np.ndarray, tiny_run: Path) -> None:
    from pcam_jax.inference.saliency import Saliency

    files = [(str(number), encoded(image)) for number, image in enumerate(images[:3])]
    reply = service.predict(files, "?heat=true")
    expected = Saliency(Predictor.load(tiny_run)).grad_cam(images[:3], np.ones(3, int))
    for heat, result in zip(expected, reply.json["results"], strict=True):
        assert result["heat_map"]["class"] == "class1"
        start, _, content = result["heat_map"]["png"].partition(",")
        assert start == "data:image/png;base64"
        drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))
        top = heat.max()
        np.testing.assert_allclose(drawn, heat / top * 255 if top > 0 else heat, atol=1.01)


def test_a_large_picture_becomes_a_map(service: Service, images: np.ndarray, tiny_run: Path) -> None:
    large = np.concatenate([np.concatenate(images[:3], axis=1), np.concatenate(images[3:6], axis=1)])[:, :33]
    reply = service.predict([("large.png", encoded(large))], "?uncertainty=true&heat=true&preview=true")
    (result,) = reply.json["results"]
    found = result["map"]
    assert (result["kind"], result["width"], result["height"]) == ("tiled", 33, 24)
    assert found["tops"] == [0, 4, 8, 12]
    assert found["lefts"] == [0, 4, 8, 12, 16, 20, 21]
    predictor = Predictor.load(tiny_run)
    tiles = np.stack(
        [large[top : top + 12, left : left + 12] for top in found["tops"] for left in found["lefts"]]
    )
    expected = predictor(tiles).reshape(4, 7)
    np.testing.assert_allclose(found["probabilities"], expected, atol=1e-4)
    assert result["probability"] == pytest.approx(expected.max(), rel=1e-4)
    assert found["at_or_above_threshold"] == (expected >= 0.5).sum()
    assert found["tiles"] == 28
    preview = Image.open(io.BytesIO(base64.b64decode(result["preview"].partition(",")[2])))
    np.testing.assert_array_equal(np.asarray(preview), large)


def test_a_bad_file_among_good_ones_has_an_error_of_its_own(service: Service, images: np.ndarray) -> None:
    good, cut = encoded(images[0]), encoded(images[1])[:60]
    reply = service.predict([("a", good), ("b", cut), ("c", b"text"), ("d", b""), ("e", good)])
    assert reply.status == 200
    assert reply.json["failed"] == 3
    errors = [result.get("error") for result in reply.json["results"]]
    assert errors[0] is errors[4] is None
    assert "cannot be read" in errors[1]
    assert "not a picture" in errors[2]
    assert "empty" in errors[3]


def test_others_about_itself(service: Service, tiny_run: Path) -> None:
    assert service.get("/healthz").json == {"status": "ok"}
    assert service.get("/readyz").json == {"status": "ready"}
    facts = api.ModelFacts(**service.get("/model").json)
    assert facts.name == tiny_run.name
    assert facts.image_shape == [12, 12, 3]
    assert facts.class_names == ["class0", "class1"]
    assert facts.heat_maps
    assert facts.runs[0]["network"] == "tiny"
    service.predict([("a", b"nothing")])
    figures = service.get("/metrics")
    assert figures.headers["content-type"].startswith("text/plain; version=0.0.4")
    text = figures.body.decode()
    assert "pcam_ready 1.0" in text
    assert "pcam_waiting_patches 0.0" in text
    assert 'pcam_pictures_total{outcome="refused"}' in text
    assert 'pcam_requests_total{method="POST",path="/predict",status="415"}' in text
    reference = service.get("/docs").body.decode()
    assert "POST /predict" in reference
    assert "?uncertainty=" in reference


def test_many_at_once_are_batched(service: Service, images: np.ndarray, tiny_run: Path) -> None:
    expected = Predictor.load(tiny_run)(images)

    def ask(number: int) -> float:
        row = number % len(images)
        return probabilities(service.predict([("x", tif_bytes(images[row]))]))[0] - float(expected[row])

    with ThreadPoolExecutor(16) as pool:
        differences = list(pool.map(ask, range(160)))
    assert np.abs(differences).max() < 1e-4


def test_several_runs_give_their_mean_and_their_spread(
    tiny_run: Path, images: np.ndarray, tmp_path: Path, train_tiny: Callable[..., Any]
) -> None:
    other = train_tiny(tmp_path / "other", train__seed=5, train__epochs=1).path
    both = np.stack([Predictor.load(run)(images[:4]) for run in (tiny_run, other)])
    with Service(tiny_run, other, "--threshold", "0.3") as service:
        reply = service.predict([(str(n), encoded(image)) for n, image in enumerate(images[:4])])
        np.testing.assert_allclose(probabilities(reply), both.mean(axis=0), rtol=1e-4)
        assert reply.json["threshold"] == 0.3
        for number, result in enumerate(reply.json["results"]):
            assert result["uncertainty"]["views"] == 2
            assert result["uncertainty"]["highest"] == pytest.approx(both[:, number].max(), rel=1e-4)
        # the second signal is one too many to wait for, the first is enough here
        assert service.stop(signal.SIGINT) == 130


def test_what_a_threshold_means_is_told_of_the_run_it_was_counted_for(tiny_run: Path, tmp_path: Path) -> None:
    counted = Path(shutil.copytree(tiny_run, tmp_path / "counted"))
    step = Predictor.load(tiny_run).step
    write_operating_point(counted, OperatingPoint(threshold=0.5, meaning="Few are missed.", step=step))

    def meaning(*runs: Path, **options: Any) -> str:
        model = ServedModel(runs, **options)
        model.close(10)
        return model.meaning

    assert meaning(counted) == "Few are missed."
    assert meaning(counted, threshold=0.4) == ""
    assert meaning(counted, tiny_run) == ""


def test_an_exported_model_answers_without_its_run(
    tiny_run: Path, images: np.ndarray, tmp_path: Path
) -> None:
    from pcam_jax.export import main

    main([str(tiny_run), "--format", "stablehlo", "--output", str(tmp_path / "model")])
    files = [(str(number), encoded(image)) for number, image in enumerate(images[:5])]
    with Service(tmp_path / "model") as service:
        reply = service.predict(files, "?uncertainty=true")
        np.testing.assert_allclose(probabilities(reply), Predictor.load(tiny_run)(images[:5]), rtol=1e-4)
        assert not service.get("/model").json["heat_maps"]
        refused = service.predict(files, "?heat=true")
        assert (refused.status, "no heat maps" in refused.error) == (422, True)
        assert service.stop() == 143


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
            assert abs(probabilities(reply)[0] - expected[row]) < 1e-4
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
