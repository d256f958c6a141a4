"""Configurations read from TOML, checked strictly, and written back in full."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, Literal

from pcam_jax.config.rules import check_config
from pcam_jax.config.schema import Config
from pcam_jax.runtime.errors import UserError


def load_config(path: str | Path | None = None, overrides: dict[str, Any] | None = None) -> Config:
    """Read a configuration, strictly.

    Args:
        path: a TOML file; None gives the defaults.
        overrides: values by dotted name (``{"train.epochs": 3}``), applied last.

    Raises:
        UserError: the file is missing or not TOML; a key or table is unknown (the nearest name is given); a
            value has the wrong type or lies outside its range.
    """
    tables: dict[str, Any] = {}
    where = "overrides"
    if path is not None:
        where = str(path)
        tables = read_toml(Path(path), "config file")
    for dotted, value in (overrides or {}).items():
        table, _, key = dotted.partition(".")
        if not key:
            raise UserError(f"override {dotted!r} names no table: write it as table.key, like train.epochs.")
        tables.setdefault(table, {})[key] = value
    return config_from_dict(tables, where)


def config_from_dict(tables: dict[str, Any], where: str = "config") -> Config:
    """Build and check a configuration from nested dictionaries, as TOML gives them.

    Raises:
        UserError: as `load_config`.
    """
    config: Config = _build(Config, tables, where, "")
    check_config(config)
    return config


def config_to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """The configuration as nested dictionaries; fields that are None are left out, as TOML has no null."""
    return {
        table: {key: value for key, value in values.items() if value is not None}
        for table, values in dataclasses.asdict(config).items()
    }


def config_to_toml(config: Config) -> str:
    """The whole configuration as TOML that `load_config` reads back to an equal one."""
    lines: list[str] = []
    for table, values in config_to_dict(config).items():
        lines.append(f"[{table}]")
        lines += [f"{key} = {_toml_value(value)}" for key, value in values.items()]
        lines.append("")
    return "\n".join(lines)


def changed_settings(before: Config, after: Config) -> list[str]:
    """Dotted names, with both values, of the settings in which two configurations differ."""
    old, new = dataclasses.asdict(before), dataclasses.asdict(after)
    return [
        f"{table}.{key} ({old[table][key]!r} -> {new[table][key]!r})"
        for table in old
        for key in old[table]
        if old[table][key] != new[table][key]
    ]


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """The tables of a TOML file, which ``what`` names in errors.

    Raises:
        UserError: the file is missing, a folder, or not TOML.
    """
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise UserError(f"There is no {what} {path}: check the path.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder: a {what} is a .toml file.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}.") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply for a {what}.") from None


def _build(kind: type, values: Any, where: str, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise UserError(f"{prefix.rstrip('.')} in {where} must be a table: write [{prefix.rstrip('.')}].")
    hints = typing.get_type_hints(kind)
    built: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            what = "key" if prefix else "table"
            raise UserError(f"Unknown {what} {prefix + key!r} in {where}{_nearest(key, prefix, hints)}.")
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            built[key] = _build(typing.cast(type, hint), value, where, f"{prefix}{key}.")
        else:
            built[key] = _checked(hint, value, f"{prefix}{key}", where)
    return kind(**built)


def _nearest(key: str, prefix: str, hints: dict[str, Any]) -> str:
    close = difflib.get_close_matches(key, hints, n=1, cutoff=0.5)
    if close:
        return f": did you mean {prefix + close[0]!r}"
    return f": known are {', '.join(hints)}"


def _checked(hint: Any, value: Any, name: str, where: str) -> Any:
    """``value`` if it fits the annotation ``hint`` (whole numbers pass as floats), else a UserError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value in arguments:
            return value
        raise UserError(
            f"{name} in {where} is {value!r}: it must be one of {', '.join(map(repr, arguments))}."
        )
    if origin is types.UnionType:
        if value is None and type(None) in arguments:
            return None
        hint = next(argument for argument in arguments if argument is not type(None))
        return _checked(hint, value, name, where)
    if origin is dict:
        if isinstance(value, dict) and all(isinstance(item, (int, float, str)) for item in value.values()):
            return value
        raise UserError(f"{name} in {where} must be a table of plain values, like {{ dropout = 0.3 }}.")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{name} in {where} is {value!r}: it must be of type {hint.__name__}.")
    return value


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _toml_string(value)
    if isinstance(value, dict):
        inner = ", ".join(f"{_toml_string(key)} = {_toml_value(item)}" for key, item in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    return repr(value)


def _toml_string(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped) + '"'
