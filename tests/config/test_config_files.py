"""Settings: there and back, strictly, with every mistake named."""

from __future__ import annotations

import dataclasses
import importlib.util
import tomllib
import typing
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pcam_jax.config.files import (
    changed_settings,
    config_from_dict,
    config_to_dict,
    config_to_toml,
    load_config,
)
from pcam_jax.config.rules import check_config
from pcam_jax.config.schema import Config
from pcam_jax.runtime.errors import UserError

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs").rglob("*.toml"))


def values_for(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type, whether or not they make sense."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is dict:
        return st.dictionaries(st.text(max_size=8), st.integers() | finite() | st.booleans() | st.text())
    if hint == float | None:
        return st.none() | finite()
    return {int: st.integers(-(2**63), 2**63 - 1), float: finite(), str: st.text(), bool: st.booleans()}[hint]


def finite() -> st.SearchStrategy[float]:
    return st.floats(allow_nan=False, allow_infinity=False)


def tables() -> st.SearchStrategy[dict[str, Any]]:
    """A configuration with any of its keys set, as nested dictionaries."""
    kinds = typing.get_type_hints(Config)
    return st.fixed_dictionaries(
        {},
        optional={
            table: st.fixed_dictionaries(
                {}, optional={key: values_for(hint) for key, hint in typing.get_type_hints(kind).items()}
            )
            for table, kind in kinds.items()
        },
    )


def built(values: dict[str, Any]) -> Config:
    """A configuration of any values of the right types, unchecked."""
    kinds = typing.get_type_hints(Config)
    return Config(**{table: kinds[table](**keys) for table, keys in values.items()})


@given(tables())
def test_toml_there_and_back_is_the_same_configuration(values: dict[str, Any]) -> None:
    config = built(values)
    read = tomllib.loads(config_to_toml(config))
    assert built(read) == config
    assert read == config_to_dict(config)


@given(tables())
def test_any_value_of_the_right_type_is_taken_or_refused_in_a_sentence(values: dict[str, Any]) -> None:
    try:
        config = config_from_dict(values)
    except UserError as error:
        message = str(error)
        assert any(f"{table}.{key}" in message for table, keys in values.items() for key in keys), message
    else:
        check_config(config)
        assert config == built(values)


@given(st.recursive(st.none() | st.booleans() | st.integers() | finite() | st.text(), lambda inner: st.lists(inner)
                    | st.dictionaries(st.sampled_from(["train", "epochs", "data", "x"]), inner)))  # fmt: skip
def test_values_of_the_wrong_shape_never_escape_as_another_error(value: Any) -> None:
    for values in (value, {"train": value}, {"train": {"epochs": value}}, {"model": {"options": value}}):
        try:
            config_from_dict(values)
        except UserError:
            continue


def test_defaults_are_valid_and_equal_to_the_default_file() -> None:
    assert load_config() == Config() == load_config(ROOT / "configs/default.toml")


def test_default_file_names_every_key() -> None:
    named = tomllib.loads((ROOT / "configs/default.toml").read_text(encoding="utf-8"))
    assert named == config_to_dict(Config())
    assert list(named) == [field.name for field in dataclasses.fields(Config)]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads_and_says_what_it_is_for(path: Path) -> None:
    config = load_config(path)
    assert config == config_from_dict(tomllib.loads(config_to_toml(config)))
    head = path.read_text(encoding="utf-8").split("[", 1)[0]
    assert head.startswith("# ")
    assert "python -m pcam_jax.train configs/" in head


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_seed_recipes_hold_the_notebook_settings(number: int) -> None:
    config = load_config(ROOT / f"configs/seeds/pcam_model{number}.toml")
    assert config.model.name == f"pcam_model{number}"
    assert (config.optimizer.name, config.optimizer.peak_lr, config.optimizer.schedule) == (
        "adam",
        1e-3,
        "constant",
    )
    assert (config.optimizer.epsilon, config.optimizer.beta1, config.optimizer.beta2) == (1e-7, 0.9, 0.999)
    assert (config.train.batch_size, config.train.epochs, config.train.early_stop_patience) == (32, 10, 2)
    assert config.train.monitor == "validation_loss"
    assert (config.data.validation_fraction, config.data.train_fraction) == (0.2, None)
    assert config.augment == Config().augment


def test_cnn3_recipe_holds_the_notebook_settings() -> None:
    config = load_config(ROOT / "configs/seeds/pcam_cnn3.toml")
    augment = config.augment
    assert (augment.horizontal_flip, augment.vertical_flip, augment.fill) == (True, True, "nearest")
    assert (augment.rotation_degrees, augment.zoom) == (20.0, 0.15)
    assert (config.train.epochs, config.train.batch_size, config.train.seed) == (10, 32, 42)
    assert config.train.early_stop_patience == 0


@pytest.mark.parametrize(
    ("text", "culprits"),
    [
        ("[train]\nepoch = 3", ["train.epoch", "train.epochs"]),
        ("[trian]\nepochs = 3", ["trian", "train"]),
        ("epochs = 3", ["epochs"]),
        ("train = 3", ["train", "table"]),
        ("[train]\nzzzz = 3", ["train.zzzz", "batch_size"]),
        ("[train]\nepochs = '3'", ["train.epochs", "int"]),
        ("[train]\nepochs = 3.5", ["train.epochs", "int"]),
        ("[train]\nepochs = true", ["train.epochs", "int"]),
        ("[train]\nmax_seconds = true", ["train.max_seconds", "float"]),
        ("[augment]\nd4 = 1", ["augment.d4", "bool"]),
        ("[optimizer]\nname = 'adma'", ["optimizer.name", "'adam'"]),
        ("[model]\noptions = { a = [1] }", ["model.options", "table"]),
        ("[data]\nstore = ['a']", ["data.store", "str"]),
        ("[train\nepochs = 3", ["not valid TOML"]),
        ("[train]\nepochs = 3\nepochs = 4", ["not valid TOML"]),
        ("x = " + "[" * 5000, ["config"]),
    ],
)
def test_mistake_in_a_file_is_named(tmp_path: Path, text: str, culprits: list[str]) -> None:
    path = tmp_path / "odd.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_config(path)
    for culprit in [*culprits, "odd.toml"]:
        assert culprit in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    for name in ("none.toml", "binary.toml", "."):
        with pytest.raises(UserError) as caught:
            load_config(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


def test_overrides_come_last(tmp_path: Path) -> None:
    path = tmp_path / "some.toml"
    path.write_text("[train]\nepochs = 3\nbatch_size = 8\n", encoding="utf-8")
    config = load_config(path, {"train.epochs": 5, "optimizer.peak_lr": 1})
    assert (config.train.epochs, config.train.batch_size) == (5, 8)
    assert config.optimizer.peak_lr == 1.0
    assert isinstance(config.optimizer.peak_lr, float)
    with pytest.raises(UserError, match="names no table"):
        load_config(None, {"epochs": 5})
    with pytest.raises(UserError, match=r"did you mean 'train\.epochs'"):
        load_config(None, {"train.epoch": 5})


def test_changed_settings_gives_both_values() -> None:
    after = load_config(None, {"train.epochs": 99, "augment.d4": True})
    assert changed_settings(Config(), Config()) == []
    assert changed_settings(Config(), after) == [
        "augment.d4 (False -> True)",
        f"train.epochs ({Config().train.epochs} -> 99)",
    ]


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generator", ROOT / "scripts/write_configuration.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_written_files_are_up_to_date() -> None:
    """`make docs` writes them."""
    made = generator()
    assert made.default_toml() == (ROOT / "configs/default.toml").read_text(encoding="utf-8")
    assert made.configuration_page() == (ROOT / "docs/configuration.md").read_text(encoding="utf-8")


def test_every_key_has_one_line_of_help() -> None:
    made = generator()
    for kind in typing.get_type_hints(Config).values():
        texts = made.help_texts(kind)
        for field in dataclasses.fields(kind):
            assert texts.get(field.name, "").strip(), f"{kind.__name__}.{field.name} has no help"
            # tyro keeps the line breaks of a docstring
            assert "\n" not in texts[field.name], f"{kind.__name__}.{field.name} has more than one line"
