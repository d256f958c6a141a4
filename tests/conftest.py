"""What tests share: raw sources (a miniature of the Kaggle set, small made-up ones), a tiny store, tiny runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import settings
from kaggle_source import KaggleSource, make_kaggle_folder

# the same examples in every run, and no limit that a busy machine breaks
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")

ROOT = Path(__file__).parents[1]
PCAM_MINI = ROOT.parent / "shared/data/pcam-mini/histopathologic-cancer-detection.zip"


def pytest_addoption(parser: pytest.Parser) -> None:
    """``pytest tests/reliability --long`` tries every crash state instead of one of each kind."""
    parser.addoption("--long", action="store_true", help="the long form of tests/reliability")


@pytest.fixture(scope="session")
def long(request: pytest.FixtureRequest) -> bool:
    """Whether the long form was asked for."""
    return bool(request.config.getoption("--long"))


def pytest_configure(config: pytest.Config) -> None:
    """Share compiled programs between all tests and their subprocesses, and with nothing else."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = tempfile.mkdtemp(prefix="pcam_jax-tests-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    # read by jax when it is imported, in every process
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    # on a GPU this process must leave room for those that tests start
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In continuous integration a missing package fails its test instead of skipping it."""
    return _missing_package_fails((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for whole files."""
    return _missing_package_fails((yield))


def _missing_package_fails(report: Any) -> Any:
    if report.skipped and os.environ.get("CI") and "could not import" in str(report.longrepr):
        report.outcome = "failed"
        report.longrepr = f"no package may be missing in continuous integration: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 60 labelled and 14 test images of 12x12 pixels."""
    return tiny.make_tiny_store(tmp_path_factory.mktemp("tiny") / "store")


@pytest.fixture(scope="session")
def train_tiny(tiny_store: Path) -> Callable[..., Any]:
    """Trains the tiny network in this process: ``train_tiny(workdir, train__epochs=2)`` returns the run."""
    tiny.register()

    def train(workdir: Path, *, store: Path = tiny_store, resume: bool = False, **overrides: Any) -> Any:
        import pcam_jax

        said = overrides.pop("say", lambda line: None)
        config = pcam_jax.load_config(None, tiny.settings(store, **overrides))
        return pcam_jax.run_training(config, workdir, resume=resume, say=said)

    return train


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, train_tiny: Callable[..., Any]) -> Path:
    """A finished run of three epochs; copy it before you change it."""
    return train_tiny(tmp_path_factory.mktemp("tiny") / "run", checkpoint__every_steps=4).path


@pytest.fixture(scope="session")
def verb() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a verb in a process of its own, warnings as errors, the tiny network known."""

    def run(name: str, *arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "error", ROOT / "tests/tiny.py", name, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT, **options)

    return run


@pytest.fixture(scope="session")
def pcam_mini() -> Path:
    """The zip of 5,000 labelled and 993 test patches."""
    if not PCAM_MINI.exists():
        pytest.skip(f"{PCAM_MINI} is not here")
    return PCAM_MINI


@pytest.fixture
def kaggle_folder(tmp_path: Path) -> Callable[..., KaggleSource]:
    """Makes Kaggle folders of random patches: ``kaggle_folder(train=12, test=5)``."""
    made = 0

    def make(train: int = 12, test: int = 5, seed: int = 0) -> KaggleSource:
        nonlocal made
        made += 1
        return make_kaggle_folder(tmp_path / f"kaggle{made}", train, test, seed)

    return make
