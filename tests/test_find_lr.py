from __future__ import annotations

import csv
import dataclasses
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from pcam_jax.config.files import load_config
from pcam_jax.config.schema import Config
from pcam_jax.find_lr import find_lr
from pcam_jax.run.command_line import ConfigCommand, options_for, parse_config_command
from pcam_jax.runtime.errors import UserError

SCRIPT = Path(tiny.__file__)


def options(store: Path, **overrides: Any) -> list[str]:
    values = tiny.settings(store, **overrides)
    del values["tracking.tensorboard"]
    return tiny.as_options(values)


def command(store: Path, *more: str, **overrides: Any) -> list[str]:
    return [sys.executable, str(SCRIPT), "find_lr", *options(store, **overrides), *more]


def test_the_verb_writes_a_curve_and_a_table_and_suggests_a_command(tiny_store: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        command(tiny_store, "--steps", "150", "--output", "curve.png"),
        cwd=tmp_path, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curve.csv", "curve.png"]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    with open(tmp_path / "curve.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    rates = np.array([float(row["learning_rate"]) for row in rows])
    np.testing.assert_allclose(rates, 1e-7 * (1e8 ** (np.arange(len(rows)) / 149)), rtol=1e-6)
    assert "Suggestion: optimizer.peak_lr = " in done.stdout
    # the command it prints is one that train understands, with all that was asked for
    line = shlex.split(done.stdout.split("Next:\n")[1])
    assert line[1:3] == ["-m", "pcam_jax.train"]
    found = parse_config_command(ConfigCommand, line[3:], prog="", description="").settings()
    asked = load_config(None, {k: v for k, v in tiny.settings(tiny_store).items() if "tracking" not in k})
    suggested = float(done.stdout.split("peak_lr = ")[1].split(". ")[0])
    assert found == dataclasses.replace(
        asked, optimizer=dataclasses.replace(asked.optimizer, peak_lr=suggested)
    )


def test_the_losses_are_those_of_training_at_these_rates(tiny_store: Path) -> None:
    tiny.register()
    config = load_config(None, tiny.settings(tiny_store, augment__d4=True, model__options={"dropout": 0.3}))
    found = find_lr(config, lowest=1e-4, highest=1e-1, steps=20, say=lambda line: None)
    np.testing.assert_allclose(found.rates, 1e-4 * 1e3 ** (np.arange(20) / 19), rtol=1e-12)
    # the first step's loss does not depend on its rate; the others do
    other = find_lr(config, lowest=1e-3, highest=1e-1, steps=20, say=lambda line: None)
    assert other.losses[0] == found.losses[0]
    assert other.losses[5] != found.losses[5]


def test_the_head_alone_has_a_rate_of_its_own(tiny_store: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    tiny.register()
    monkeypatch.chdir(tmp_path)
    from pcam_jax.find_lr import main

    main([*options(tiny_store), "--head-only", "--steps", "100", "--output", "head.svg"])
    assert "optimizer.freeze_lr = " in capsys.readouterr().out
    assert (tmp_path / "head.svg").exists()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--output", "lr.jpg"], "written as .png or .svg"),
        (["--output", "absent/lr.png"], "There is no folder absent"),
        (["--lowest", "1", "--highest", "0.1"], "must be above 0 and rise"),
        (["--steps", "5"], "fewer than 20"),
        (["--model.init-from", "absent.safetensors"], "There is no file absent.safetensors"),
    ],
)
def test_a_mistake_is_a_sentence_and_writes_nothing(
    tiny_store: Path, tmp_path: Path, monkeypatch, more: list[str], sentence: str
) -> None:
    tiny.register()
    monkeypatch.chdir(tmp_path)
    from pcam_jax.find_lr import main

    with pytest.raises(UserError, match=sentence):
        main([*options(tiny_store), *more])
    assert list(tmp_path.iterdir()) == []


def test_a_signal_stops_it_and_nothing_is_written(tiny_store: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(tiny_store, "--steps", "1000000", "--highest", "1e-6"),
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    while not process.stdout.readline().startswith("Trying"):
        assert process.poll() is None
    process.terminate()
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Stopped; nothing was written." in stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"train.epochs": 3, "optimizer.peak_lr": 0.00032, "augment.d4": True},
        {"tracking.tensorboard": False, "model.options": {"stem": "stride1"}, "data.train_fraction": 0.25},
    ],
)
def test_options_for_a_configuration_mean_it(overrides: dict[str, Any], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[train]\nepochs = 7\nbatch_size = 16\n")
    for path in (None, recipe):
        config = load_config(path, overrides)
        parsed = parse_config_command(ConfigCommand, options_for(path, config), prog="", description="")
        assert parsed.settings() == config
        assert isinstance(parsed.settings(), Config)
