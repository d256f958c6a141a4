"""The benchmark of the service against a real one, and what it calls a fault."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_serve.py"


@pytest.fixture
def siege(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return importlib.import_module("serving.siege")


@pytest.fixture(scope="module")
def run(tmp_path_factory, train_tiny):
    """A run of a registered network, since the script's service knows no other."""
    folder = tmp_path_factory.mktemp("bench-serve")
    settings = {"model__name": "pcam_model4", "train__epochs": 1}
    from pcam_jax.data.sample import write_sample_store

    store = write_sample_store(folder / "store", count=40, test_count=2, slides=8, image_size=32).path
    return train_tiny(folder / "run", store=store, **settings).path


def bench(*arguments):
    command = [sys.executable, "-W", "error", SCRIPT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def test_it_compares_the_service_with_the_bare_predictor(run, tmp_path):
    output = tmp_path / "figures"
    options = ["--files", "8", "--rounds", "1", "--seconds", "0.3", "--singles", "8"]
    done = bench(run, *options, "--output", output)
    assert done.returncode == 0, done.stderr
    record = json.loads(output.with_suffix(".json").read_text())
    (found,) = record["results"]
    assert found["network"] == "pcam_model4"
    assert found["of_bare"] == found["served_images_per_second"] / found["bare_images_per_second"]
    for name in ("large_request_ms", "single_request_ms", "single_requests_of_8_clients_ms"):
        assert 0 < found[name]["p50"] <= found[name]["p99"]
    assert output.with_suffix(".md").read_text().rstrip().endswith(done.stdout.strip())


def test_a_short_siege(run, tmp_path):
    output = tmp_path / "siege"
    done = bench(run, "--mixed", "4", "--output", output)
    record = json.loads(output.with_suffix(".json").read_text())
    answers = {(one["request"], one["answer"]) for one in record["answers"]}
    # in so short a time memory has not settled; all else must hold
    assert [fault for fault in record["faults"] if "memory" not in fault] == [], done.stdout
    assert done.returncode == bool(record["faults"])
    assert any(answer == "200" for _, answer in answers)
    assert any(answer.startswith("4") for _, answer in answers)
    assert not {answer for _, answer in answers} - {
        "200",
        "400",
        "404",
        "405",
        "413",
        "415",
        "422",
        "503",
        "left",
    }
    assert len(record["memory_mib"]) > 10


@pytest.mark.parametrize(
    ("answer", "wanted_good", "words"),
    [
        ((200, {"content-type": "application/json"}, b"{}"), True, ""),
        ((200, {"content-type": "application/json"}, b"{}"), False, "answered 200"),
        ((422, {"content-type": "application/json"}, b'{"error": "No."}'), False, ""),
        ((422, {"content-type": "application/json"}, b'{"error": "No."}'), True, "answered 422"),
        ((422, {"content-type": "application/json"}, b'{"error": "KeyError"}'), False, "without a sentence"),
        ((500, {"content-type": "application/json"}, b'{"error": "No."}'), False, "500"),
        ((503, {"content-type": "application/json", "retry-after": "1"}, b'{"error": "No."}'), True, ""),
        ((503, {"content-type": "application/json"}, b'{"error": "No."}'), True, "503 without Retry-After"),
        (None, False, ""),
    ],
)
def test_what_is_a_fault(siege, answer, wanted_good, words):
    tally = siege.Tally()
    siege.judge(tally, "kind", answer, wanted_good=wanted_good)
    assert len(tally.faults) == bool(words)
    assert all(words in fault for fault in tally.faults)
    assert sum(tally.answers.values()) == 1
