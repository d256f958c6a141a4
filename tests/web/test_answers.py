"""What a real service answers: probabilities, uncertainty, heat maps, maps of large pictures, facts about itself."""

from __future__ import annotations

import base64
import io
import shutil
import signal
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kaggle_source import tif_bytes
from picture_files import encoded
from PIL import Image
from service import Reply, Service

from pcam_jax.data.store import open_store
from pcam_jax.inference.predictor import Predictor
from pcam_jax.run.operating_point import OperatingPoint, write_operating_point
from pcam_jax.web import api
from pcam_jax.web.model import ServedModel


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
