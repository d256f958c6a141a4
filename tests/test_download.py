"""The verb `download` with Kaggle's client, whose place a script with its command line takes.

The real client signs in at Kaggle when it starts. What comes over HTTP from elsewhere is in data/test_remote.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

CLIENT = """
import os, pathlib, sys, zipfile
kind, download, slug, option, folder = sys.argv[1:]
assert (download, option) == ("download", "-p")
print("asked for", kind, slug)
outcome = os.environ["OUTCOME"]
if outcome == "refused":
    sys.exit("403 Client Error: Forbidden")
path = pathlib.Path(folder) / (slug.rpartition("/")[2] + ".zip")
if outcome == "page":
    path.write_text("<!DOCTYPE html><html>log in")
if outcome == "right":
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train_labels.csv", "id,label\\n")
"""
SETS = {
    "kaggle": "competitions histopathologic-cancer-detection",
    "idc": "datasets paultimothymooney/breast-histopathology-images",
}
Download = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def download(tmp_path: Path) -> Download:
    package = tmp_path / "packages/kaggle"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "cli.py").write_text(CLIENT)

    def run(name: str, outcome: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "error", "-m", "pcam_jax.download", name, str(tmp_path / "raw")]
        environment = {
            **os.environ,
            "PYTHONPATH": str(tmp_path / "packages"),
            "HOME": str(tmp_path),
            "OUTCOME": outcome,
        }
        return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)

    return run


@pytest.mark.parametrize("token", ["kaggle.json", "access_token", "credentials.json"])
def test_every_kind_of_token_is_known(download: Download, tmp_path: Path, token: str) -> None:
    (tmp_path / ".kaggle").mkdir()
    (tmp_path / ".kaggle" / token).write_text("{}")
    done = download("kaggle", "right")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", SETS)
def test_a_set_is_fetched_once(download: Download, tmp_path: Path, monkeypatch, name: str) -> None:
    monkeypatch.setenv("KAGGLE_API_TOKEN", "mine")
    done = download(name, "right")
    assert done.returncode == 0, done.stderr
    assert f"asked for {SETS[name]}\n" in done.stdout
    target = tmp_path / f"raw/{SETS[name].rpartition('/')[2].rpartition(' ')[2]}.zip"
    assert zipfile.is_zipfile(target)
    assert f"pcam_jax.prepare {target} STORE" in done.stdout
    again = download(name, "refused")
    assert again.returncode == 0
    assert "is there already" in again.stderr


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        ("refused", "a 403 means that the rules on the set's page are not accepted yet"),
        ("page", "is a web page (HTML)"),
        ("nothing", "left no zip at"),
    ],
)
def test_what_the_client_cannot_get_is_said(
    download: Download, tmp_path: Path, monkeypatch, outcome: str, said: str
) -> None:
    monkeypatch.setenv("KAGGLE_API_TOKEN", "mine")
    done = download("kaggle", outcome)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "raw").iterdir()) == []
