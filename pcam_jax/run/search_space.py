"""What a search varies: a TOML file of ranges and choices over the names of the configuration."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pcam_jax.config.files import config_from_dict, config_to_dict, read_toml
from pcam_jax.config.schema import Config
from pcam_jax.runtime.errors import UserError

_RANGE_KEYS = {"low", "high", "log", "step"}


class Trial(Protocol):
    """What is asked of a search's trial (Optuna's)."""

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None, log: bool) -> float:
        """A number between low and high."""

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int:
        """A whole number between low and high."""

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any:
        """One of the choices."""


@dataclass(frozen=True)
class SearchSpace:
    """Ranges and choices by dotted name.

    Attributes:
        entries: name (``optimizer.peak_lr``, ``model.options.dropout``) -> its table in the file.
    """

    entries: dict[str, dict[str, Any]]

    def suggest(self, trial: Trial) -> dict[str, Any]:
        """A value for each name."""
        return {name: _suggest(trial, name, entry) for name, entry in self.entries.items()}

    def config(self, base: Config, values: dict[str, Any]) -> Config:
        """The configuration with these values; raises UserError where they do not fit."""
        tables = copy.deepcopy(config_to_dict(base))
        for name, value in values.items():
            *path, key = name.split(".")
            table: dict[str, Any] = tables
            for part in path:
                table = table.setdefault(part, {})
                if not isinstance(table, dict):
                    raise UserError(f"[{name}] in the search space: {part} is a setting, not a table.")
            table[key] = value
        return config_from_dict(tables, "the search space")

    def to_json(self) -> str:
        """The space as text, to tell spaces apart."""
        return json.dumps(self.entries, sort_keys=True)


def read_space(path: Path, base: Config) -> SearchSpace:
    """Read a search space and try its limits on a configuration.

    Raises:
        UserError: no such file, not TOML, an unknown name, or a range or value that does not fit.
    """
    tables = read_toml(path, "search space")
    entries: dict[str, dict[str, Any]] = {}
    _collect(tables, "", entries, path)
    if not entries:
        raise UserError(f"{path} varies nothing: add a table like [optimizer.peak_lr] with low and high.")
    space = SearchSpace(entries)
    for name, entry in entries.items():
        _check_entry(name, entry, path)
        for value in entry.get("choices", [entry.get("low"), entry.get("high")]):
            space.config(base, {name: value})
    return space


def _collect(tables: dict[str, Any], prefix: str, entries: dict[str, dict[str, Any]], path: Path) -> None:
    for key, value in tables.items():
        name = f"{prefix}{key}"
        if not isinstance(value, dict):
            raise UserError(f"{name} in {path} is no table: write [{name}] with low and high, or choices.")
        if "choices" in value or _RANGE_KEYS & value.keys():
            entries[name] = value
        else:
            _collect(value, f"{name}.", entries, path)


def _check_entry(name: str, entry: dict[str, Any], path: Path) -> None:
    where = f"[{name}] in {path}"
    if "choices" in entry:
        if set(entry) != {"choices"} or not isinstance(entry["choices"], list) or not entry["choices"]:
            raise UserError(f"{where} must have choices alone, a list of at least one value.")
        if not all(isinstance(choice, (bool, int, float, str)) for choice in entry["choices"]):
            raise UserError(f"{where}: choices must be plain values.")
        return
    unknown = set(entry) - _RANGE_KEYS
    low, high = entry.get("low"), entry.get("high")
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (low, high))
    if unknown or not numbers:
        raise UserError(f"{where} must have low and high, and may have log or step, or else choices.")
    if low >= high or (entry.get("log") and low <= 0):  # type: ignore[operator]
        raise UserError(f"{where}: low must be below high, and above 0 with log = true.")
    if entry.get("log") and "step" in entry:
        raise UserError(f"{where}: log and step exclude each other.")


def _suggest(trial: Trial, name: str, entry: dict[str, Any]) -> Any:
    if "choices" in entry:
        return trial.suggest_categorical(name, entry["choices"])
    low, high, log = entry["low"], entry["high"], bool(entry.get("log", False))
    if isinstance(low, int) and isinstance(high, int):
        return trial.suggest_int(name, low, high, step=int(entry.get("step", 1)), log=log)
    return trial.suggest_float(name, float(low), float(high), step=entry.get("step"), log=log)
