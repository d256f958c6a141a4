"""The page in a real Chromium against a real service: pictures in, results, heat maps, a table out, and mistakes."""

from __future__ import annotations

import csv
import io
import json
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import browser as chromium
import numpy as np
import page_checks
import pytest
from kaggle_source import tif_bytes
from PIL import Image
from service import Service

from pcam_jax.data.sample import sample_patches, write_sample_store

DONE = "items.length && items.every(item => item.state === 'done' || item.state === 'error')"


class Screen:
    """The page in one window."""

    def __init__(self, page: chromium.Page) -> None:
        self.page = page

    def wait(self, expression: str, seconds: float = 60) -> Any:
        deadline = time.monotonic() + seconds
        while not (value := self.page.evaluate(expression)):
            assert time.monotonic() < deadline, (expression, self.page.complaints())
            time.sleep(0.02)
        return value

    def choose(self, *paths: Path) -> None:
        root = self.page.call("DOM.getDocument")["root"]["nodeId"]
        node = self.page.call("DOM.querySelector", nodeId=root, selector="#choose")["nodeId"]
        self.page.call("DOM.setFileInputFiles", files=[str(path) for path in paths], nodeId=node)
        self.wait(DONE)

    def key(self, name: str, code: int) -> None:
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if name == "Enter" and kind == "keyDown" else {}
            self.page.call("Input.dispatchKeyEvent", type=kind, key=name, windowsVirtualKeyCode=code, **text)

    def measure(self) -> dict[str, Any]:
        """What must hold for every page, as it is laid out now."""
        measured: dict[str, Any] = self.page.evaluate(page_checks._MEASURE)
        for name in ("wide", "faint", "tooSmall"):
            assert measured[name] == [], json.dumps(measured)
        assert measured["overflow"] <= 0
        assert measured["broken"] == measured["speechless"] == 0
        return measured


@pytest.fixture(scope="module")
def model_run(tmp_path_factory: pytest.TempPathFactory, train_tiny: Callable[..., Any]) -> Path:
    """A run of 96x96 patches, as PatchCamelyon's."""
    folder = tmp_path_factory.mktemp("page")
    store = write_sample_store(folder / "store", count=60, test_count=4, slides=10).path
    return train_tiny(folder / "run", store=store, train__epochs=1).path


@pytest.fixture(scope="module")
def service(model_run: Path) -> Iterator[Service]:
    with Service(model_run) as running:
        yield running
        assert running.stop() == 143


@pytest.fixture(scope="module")
def window() -> Iterator[chromium.Browser]:
    if chromium.executable() is None:
        pytest.skip("no chromium here; apt-get install chromium")
    with chromium.Browser() as running:
        yield running


@pytest.fixture
def screen(window: chromium.Browser, service: Service) -> Screen:
    opened = Screen(window.open(f"{service.address}/", 1200))
    opened.wait("document.querySelectorAll('#example-list img').length === 9")
    return opened


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Patches as tif (plain and deflated), png and jpeg, a zip of two, a larger picture, and what is no picture."""
    folder = tmp_path_factory.mktemp("pictures")
    patches = sample_patches(6, seed=3, slides=6).images
    (folder / "plain.tif").write_bytes(tif_bytes(patches[0]))
    Image.fromarray(patches[1]).save(folder / "packed.tif", compression="tiff_adobe_deflate")
    Image.fromarray(patches[2]).save(folder / "=cmd|' C calc'.png")
    Image.fromarray(patches[3]).save(folder / "photo.jpg")
    with zipfile.ZipFile(folder / "two.zip", "w") as archive:
        for number in (4, 5):
            archive.writestr(f"folder/z{number}.tif", tif_bytes(patches[number]))
    large = sample_patches(1, seed=3, image_size=200).images[0]
    Image.fromarray(large).save(folder / "large.png")
    (folder / "notes.txt").write_text("<img src=x onerror=alert(1)>")
    return folder


def test_pictures_of_every_kind(screen: Screen, pictures: Path, service: Service) -> None:
    names = ["plain.tif", "packed.tif", "=cmd|' C calc'.png", "photo.jpg", "large.png", "notes.txt"]
    screen.choose(*(pictures / name for name in names), pictures / "two.zip")
    found = screen.page.evaluate(
        "items.map(item => [item.name, item.state, item.result && item.result.probability])"
    )
    assert [name for name, _, _ in found] == [*names, "z4.tif", "z5.tif"]
    assert [state for _, state, _ in found] == ["done"] * 5 + ["error"] + ["done"] * 2
    sent = service.predict([(name, (pictures / name).read_bytes()) for name in names[:5]])
    expected = [result["probability"] for result in sent.json["results"]]
    np.testing.assert_allclose([value for _, _, value in found[:5]], expected, rtol=1e-4)
    # every picture is seen, also the tif that the browser cannot show
    screen.wait("items.filter(item => item.canvas).length === 7")
    shown = screen.page.evaluate(
        "items[0].canvas.getContext('2d').getImageData(5, 7, 1, 1).data.slice(0, 3).join()"
    )
    plain = np.asarray(Image.open(pictures / "plain.tif"))[7, 5]
    assert shown == ",".join(map(str, plain))
    assert "not a picture" in screen.page.evaluate("items[5].card.textContent")
    assert (
        screen.page.evaluate("$('status').textContent") == "7 of 8 pictures looked at. 1 could not be used."
    )
    assert screen.page.evaluate("document.querySelectorAll('.card .center').length") == 6
    label = screen.page.evaluate("items[0].card.getAttribute('aria-label')")
    assert label.startswith("plain.tif: called ")
    screen.measure()
    assert screen.page.complaints() == []
    addresses = [url for url in screen.page.requests() if not url.startswith(("data:", "blob:"))]
    assert all(url.startswith(service.address) for url in addresses)


def test_sorting_filtering_and_the_table(screen: Screen, pictures: Path) -> None:
    screen.choose(
        *(pictures / name for name in ("plain.tif", "packed.tif", "=cmd|' C calc'.png", "notes.txt"))
    )

    def order() -> list[str]:
        return screen.page.evaluate("[...document.querySelectorAll('#grid .name')].map(e => e.textContent)")

    def pick(control: str, value: str) -> None:
        screen.page.evaluate(
            f"$('{control}').value = '{value}', $('{control}').dispatchEvent(new Event('change'))"
        )
        screen.page.evaluate(f"$('{control}').dispatchEvent(new Event('input'))")

    values = screen.page.evaluate(
        "Object.fromEntries(items.map(i => [i.name, i.result ? i.result.probability : -1]))"
    )
    pick("sort", "high")
    assert order() == sorted(values, key=lambda name: -values[name])
    pick("sort", "name")
    assert order() == sorted(values)
    pick("filter", "error")
    assert order() == ["notes.txt"]
    pick("filter", "all")
    middle = sorted(value for value in values.values() if value >= 0)[1]
    pick("least", str(int(100 * middle)))
    assert set(order()) == {name for name, value in values.items() if value >= int(100 * middle) / 100}
    pick("least", "0")
    pick("sort", "added")
    rows = list(csv.reader(io.StringIO(screen.page.evaluate("csv()"))))
    assert rows[0][:3] == ["name", "probability", "decision"]
    assert [row[0] for row in rows[1:]] == ["plain.tif", "packed.tif", "'=cmd|' C calc'.png", "notes.txt"]
    for row in rows[1:4]:
        assert float(row[1]) == values[row[0].removeprefix("'")]
        assert float(row[4]) <= float(row[5])
    assert "not a picture" in rows[4][12]
    assert all(len(row) == len(rows[0]) for row in rows)


def test_the_table_is_saved(screen: Screen, pictures: Path, tmp_path: Path, window: chromium.Browser) -> None:
    window.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    screen.choose(pictures / "plain.tif")
    screen.page.evaluate("$('csv-button').click()")
    deadline = time.monotonic() + 20
    while not (tmp_path / "predictions.csv").is_file():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert (tmp_path / "predictions.csv").read_text().startswith("name,probability,decision")


def test_heat_maps_lie_over_the_pictures(screen: Screen, pictures: Path) -> None:
    screen.choose(pictures / "plain.tif", pictures / "photo.jpg")
    screen.page.evaluate("$('heat-button').click()")
    screen.wait("items.every(item => item.heat)")
    assert screen.page.evaluate("document.querySelectorAll('.card canvas[aria-hidden]').length") == 2
    screen.page.evaluate("$('opacity').value = 35, $('opacity').dispatchEvent(new Event('input'))")
    opacities = "[...document.querySelectorAll('.card canvas[aria-hidden]')].map(e => e.style.opacity)"
    assert screen.page.evaluate(opacities) == ["0.35", "0.35"]
    assert screen.page.evaluate("items[0].heat.width") == 96


def test_one_picture_by_keyboard(screen: Screen, pictures: Path) -> None:
    screen.choose(pictures / "plain.tif", pictures / "large.png", pictures / "photo.jpg")
    screen.page.evaluate("items[0].card.focus()")
    screen.key("Enter", 13)
    screen.wait("$('detail').open")
    assert screen.page.evaluate("$('detail-name').textContent") == "plain.tif"
    words = screen.page.evaluate("$('detail-words').textContent")
    assert words.startswith("Called ")
    assert "the threshold of 50.0 %" in words
    screen.page.evaluate("$('detail-show').click()")
    screen.wait("Boolean(items[0].heat && $('detail-picture').querySelector('canvas[aria-hidden]'))")
    assert screen.page.evaluate("$('detail-picture').querySelectorAll('.center').length") == 1
    screen.page.evaluate("$('detail-center').click()")
    assert screen.page.evaluate("$('detail-picture').querySelectorAll('.center').length") == 0
    screen.key("ArrowRight", 39)
    assert screen.page.evaluate("$('detail-name').textContent") == "large.png"
    assert "tiles reach the threshold" in screen.page.evaluate("$('detail-words').textContent")
    assert screen.page.evaluate("$('detail-picture').querySelectorAll('canvas').length") == 2
    screen.key("Escape", 27)
    screen.wait("!$('detail').open && document.activeElement === items[1].card")


def test_drop_and_examples(screen: Screen) -> None:
    screen.page.evaluate(
        """(async () => { const transfer = new DataTransfer();
        for (const image of [...document.querySelectorAll('#example-list img')].slice(0, 2))
          transfer.items.add(new File([await new Promise(done => { const c = document.createElement('canvas');
            c.width = c.height = 96; c.getContext('2d').drawImage(image, 0, 0); c.toBlob(done); })], 'dropped.png'));
        document.body.dispatchEvent(new DragEvent('drop', {dataTransfer: transfer, bubbles: true, cancelable: true}));
        })()"""
    )
    screen.wait(f"items.length === 2 && {DONE}")
    screen.page.evaluate("$('clear-button').click()")
    assert screen.page.evaluate("$('results').hidden && !$('examples').hidden")
    screen.page.evaluate("$('examples-button').click()")
    screen.wait(f"items.length === 9 && {DONE}")
    assert screen.page.evaluate("items.filter(item => item.state === 'done').length") == 9
    assert screen.page.evaluate("items[8].result.kind") == "tiled"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_everywhere(screen: Screen, pictures: Path, scheme: str) -> None:
    screen.page.call(
        "Emulation.setEmulatedMedia",
        features=[
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ],
    )
    first = screen.measure()
    assert first["lang"] == "en"
    assert first["headings"][0] == 1
    screen.choose(pictures / "plain.tif", pictures / "large.png", pictures / "notes.txt")
    for width in (1200, 800, 360):
        screen.page.resize(width, 800, mobile=width < 600)
        screen.measure()
        screen.page.evaluate("items[0].card.click()")
        screen.measure()
        screen.page.evaluate("$('close').click()")
    named = """[...document.querySelectorAll('button, input, select')].filter(e => e.getClientRects().length
        && !e.textContent.trim() && !e.labels?.length && !e.getAttribute('aria-label') && !e.querySelector('img'))
        .map(e => e.id)"""
    assert screen.page.evaluate(named) == []
    assert "Research use only. Not a medical device." in screen.page.evaluate("document.body.innerText")


def test_a_token_is_asked_for(
    window: chromium.Browser, model_run: Path, pictures: Path, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("a-long-random-word-1234\n")
    with Service(model_run, "--token-file", tmp_path / "token", "--root-path", "/pcam") as service:
        screen = Screen(window.open(f"{service.address}/pcam/", 1200))
        screen.wait("!$('token-form').hidden")
        screen.page.evaluate("$('token').value = 'a-long-random-word-1234', $('token-form').requestSubmit()")
        screen.wait("document.querySelectorAll('#example-list img').length === 9")
        screen.choose(pictures / "plain.tif")
        assert screen.page.evaluate("items[0].state") == "done"
        addresses = [url for url in screen.page.requests() if not url.startswith(("data:", "blob:"))]
        assert all(url.startswith(f"{service.address}/pcam/") for url in addresses)


def test_a_service_that_restarts_is_waited_for(
    window: chromium.Browser, model_run: Path, pictures: Path
) -> None:
    with Service(model_run) as first:
        screen = Screen(window.open(f"{first.address}/", 1200))
        screen.wait("document.querySelectorAll('#example-list img').length === 9")
        port = first.port
        first.process.kill()
        first.process.wait()
    screen.page.evaluate("$('choose').id")  # the page itself lives on
    root = screen.page.call("DOM.getDocument")["root"]["nodeId"]
    node = screen.page.call("DOM.querySelector", nodeId=root, selector="#choose")["nodeId"]
    screen.page.call("DOM.setFileInputFiles", files=[str(pictures / "plain.tif")], nodeId=node)
    screen.wait("$('status').textContent.includes('cannot be reached')")
    with Service(model_run, "--port", port):
        screen.wait(DONE)
        assert screen.page.evaluate("items[0].state") == "done"
