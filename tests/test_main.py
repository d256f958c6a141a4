"""The dispatcher, and what every verb's command line has in common."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from pcam_jax.__main__ import VERBS, dispatch
from pcam_jax.runtime.command import python_command
from pcam_jax.runtime.errors import UserError

PACKAGE = Path(__file__).parents[1] / "pcam_jax"
VERB_FILES = sorted(
    path.stem for path in PACKAGE.glob("*.py") if path.stem not in ("__init__", "__main__", "config")
)


def test_every_verb_is_listed_and_nothing_else() -> None:
    assert sorted(VERBS) == VERB_FILES


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_list_of_verbs(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    dispatch(argv)
    said = capsys.readouterr().out
    for name, purpose in VERBS.items():
        assert name in said
        assert purpose in said


def test_unknown_verb_gets_the_nearest() -> None:
    with pytest.raises(UserError, match=r"'trian'.*did you mean 'train'"):
        dispatch(["trian"])
    with pytest.raises(UserError, match="known are download"):
        dispatch(["xyzzy"])


@pytest.mark.parametrize("verb", VERB_FILES)
def test_help_names_the_command_and_leaves_with_0(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        dispatch([verb, "--help"])
    assert leaving.value.code == 0
    said = capsys.readouterr().out
    assert f"usage: python -m pcam_jax.{verb}" in said
    assert importlib.import_module(f"pcam_jax.{verb}").__doc__, "a verb says in its docstring what it does"


@pytest.mark.parametrize("verb", VERB_FILES)
def test_unknown_option_is_a_short_message_with_2(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((UserError, SystemExit)) as leaving:
        dispatch([verb, "--no-such-option", "3"])
    assert isinstance(leaving.value, UserError) or leaving.value.code == 2
    said = str(leaving.value) + capsys.readouterr().err
    complaints = ("--no-such-option", "required", "Missing argument", "invalid choice")
    assert any(complaint in said for complaint in complaints)
    assert "Traceback" not in said
    assert len(said.splitlines()) < 25


@pytest.mark.parametrize(
    ("argv", "culprit"),
    [
        (["--train.bach-size", "4"], "--train.batch-size"),
        (["--train.epochs", "many"], "--train.epochs"),
        (["--train.epochs"], "--train.epochs"),
        (["--data.placement", "moon"], "--data.placement"),
        (["one.toml", "two.toml"], "two.toml"),
    ],
)
def test_options_that_do_not_parse_are_named(
    argv: list[str], culprit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leaving:
        dispatch(["train", *argv])
    assert leaving.value.code == 2
    assert culprit in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--train.batch-size", "-4"], "train.batch_size is -4"),
        (["none.toml"], "There is no config file none.toml"),
        (["--model.options", "dropuot", "0.3", "--model.name", "pcam_model4"], "did you mean dropout"),
        (["--model.name", "pcam_model5"], "pcam_model4"),
        (["--data.store", "none.store"], "none.store"),
    ],
)
def test_settings_that_make_no_sense_are_one_sentence(
    argv: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_store: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        dispatch(["train", "--data.store", str(tiny_store), "--workdir", "run", *argv])
    assert sentence in str(caught.value)
    assert not os.listdir(tmp_path)


def test_command_line_overrides_the_file(tmp_path: Path) -> None:
    from pcam_jax.train import parse_command

    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        '[model]\nname = "pcam_model4"\n[train]\nepochs = 3\nbatch_size = 8\n', encoding="utf-8"
    )
    argv = [
        str(recipe),
        "--train.epochs",
        "5",
        "--model.options",
        "dropout",
        "0.3",
        "--augment.d4",
        "--resume",
    ]
    command = parse_command(argv)
    assert (command.train.epochs, command.train.batch_size) == (5, 8)
    assert command.model.name == "pcam_model4"
    assert command.model.options == {"dropout": 0.3}
    assert command.augment.d4
    assert command.resume
    assert parse_command(["--train.batch_size", "16"]).train.batch_size == 16


def test_options_of_a_recipe_belong_to_its_network(tmp_path: Path) -> None:
    from pcam_jax.train import parse_command

    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[model]\nname = "pcam_model4"\noptions = { dropout = 0.2 }\n', encoding="utf-8")
    assert parse_command([str(recipe)]).model.options == {"dropout": 0.2}
    assert parse_command([str(recipe), "--model.options", "dropout", "0.4"]).model.options == {"dropout": 0.4}
    assert parse_command([str(recipe), "--model.name", "pcam_model3"]).model.options == {}


def test_module_and_console_script_are_the_same_command() -> None:
    outcome = subprocess.run(
        [sys.executable, "-W", "error", "-m", "pcam_jax", "trian"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (outcome.returncode, outcome.stdout) == (2, "")
    assert outcome.stderr == "error: There is no verb 'trian': did you mean 'train'?\n"
    (script,) = metadata.entry_points(group="console_scripts", name="pcam-jax")
    assert script.value == "pcam_jax.__main__:main"


def test_commands_are_named_so_that_they_can_be_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = tmp_path / "env"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin/python").write_text("#!/bin/sh\n", encoding="utf-8")
    (environment / "bin/python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(environment / "bin/python3"))
    monkeypatch.setattr(sys, "prefix", str(environment))
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    monkeypatch.setenv("PATH", "")
    assert python_command() == str(environment / "bin/python")
    monkeypatch.chdir(tmp_path)
    assert python_command() == "env/bin/python"
    monkeypatch.setenv("PATH", str(environment / "bin"))
    assert python_command() == "python"
    monkeypatch.setattr(sys, "base_prefix", str(environment))
    monkeypatch.setenv("PATH", "")
    assert python_command() == "python"
