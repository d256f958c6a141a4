"""Settings on a command line: options on top of the file it names, on top of the defaults."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from pcam_jax.config.files import config_to_dict, load_config
from pcam_jax.config.schema import Config


@dataclasses.dataclass(frozen=True)
class ConfigCommand(Config):
    """A command that takes a whole configuration; verbs add options of their own."""

    config: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[CONFIG.toml]")] = None
    """Settings to start from; the options below override them. Without it, the defaults shown."""

    def settings(self) -> Config:
        """The configuration alone."""
        return Config(**_tables(self))


Command = TypeVar("Command", bound=ConfigCommand)


def parse_config_command(kind: type[Command], argv: list[str], *, prog: str, description: str) -> Command:
    """Read a command line.

    Args:
        kind: the command.
        argv: arguments after the verb.
        prog: how the command is called, for its help.
        description: the first words of its help.

    Raises:
        UserError: the file is missing or wrong.
        SystemExit: an option is unknown or does not parse (2), or help was asked for (0).
    """

    def parse(default: Command) -> Command:
        return tyro.cli(kind, args=argv, default=default, prog=prog, description=description)

    command = parse(kind())
    if command.config is None:
        return command
    loaded = load_config(command.config)
    # tyro takes a dictionary as NAME VALUE pairs only where its default is empty
    without_options = dataclasses.replace(loaded, model=dataclasses.replace(loaded.model, options={}))
    command = parse(dataclasses.replace(kind(config=command.config), **_tables(without_options)))
    options = command.model.options
    if command.model.name == loaded.model.name:  # another network has other options
        options = loaded.model.options | options
    return dataclasses.replace(command, model=dataclasses.replace(command.model, options=options))


def options_for(path: Path | None, config: Config) -> list[str]:
    """The file and options that make a command line mean a configuration.

    Args:
        path: the file to start from, or None for the defaults.
        config: what the whole must mean.
    """
    before, after = config_to_dict(load_config(path)), config_to_dict(config)
    options = [str(path)] if path is not None else []
    for table, values in after.items():
        for key, value in values.items():
            if value == before[table].get(key):
                continue
            name = f"{table}.{key.replace('_', '-')}"
            if isinstance(value, bool):
                options.append(f"--{name}" if value else f"--{table}.no-{key.replace('_', '-')}")
            elif isinstance(value, dict):
                options += [f"--{name}", *(str(word) for pair in value.items() for word in pair)]
            else:
                options += [f"--{name}", f"{value:g}" if isinstance(value, float) else str(value)]
    return options


def _tables(config: Config) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(Config)}
