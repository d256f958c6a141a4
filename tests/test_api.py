"""The public Python interface: lazy, complete, and no hindrance to the verbs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import pcam_jax


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments], capture_output=True, text=True, check=False, timeout=120
    )


def test_every_public_name_is_there_and_listed() -> None:
    assert dir(pcam_jax) == sorted(pcam_jax.__all__)
    for name in pcam_jax.__all__:
        assert getattr(pcam_jax, name) is not None
    for name in ("load_config", "prepare_store", "run_training", "Predictor", "write_submission"):
        assert name in pcam_jax.__all__


def test_names_are_found_where_they_are_said_to_live() -> None:
    assert set(pcam_jax._HOMES) | {"__version__"} == set(pcam_jax.__all__)
    for name, home in pcam_jax._HOMES.items():
        assert getattr(pcam_jax, name).__module__ == home


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = pcam_jax.trian


def test_api_names_differ_from_verbs() -> None:
    """An export named like a module would make `python -m` warn and shadow the module."""
    from pcam_jax.__main__ import VERBS

    assert not set(pcam_jax.__all__) & set(VERBS)


def test_import_loads_nothing_else() -> None:
    code = "import sys, pcam_jax; print([name for name in sys.modules if name.startswith('pcam_jax')])"
    outcome = run_python("-c", code)
    assert outcome.stdout.strip() == "['pcam_jax']", outcome.stderr


def test_version_is_the_installed_one() -> None:
    from importlib import metadata

    assert metadata.version("pcam-jax") == pcam_jax.__version__


def test_a_verb_starts_without_warnings() -> None:
    outcome = run_python("-m", "pcam_jax.train", "--help")
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stderr == ""
    assert "--train.batch-size" in outcome.stdout
    assert "[CONFIG.toml]" in outcome.stdout
