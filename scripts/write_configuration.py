"""Write docs/configuration.md and configs/default.toml from pcam_jax/config/schema.py; `make docs` runs it."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import typing
from pathlib import Path
from types import UnionType
from typing import Any, Literal

from pcam_jax.config.files import config_to_toml
from pcam_jax.config.schema import Config

ROOT = Path(__file__).parents[1]

_INTRODUCTION = """\
# Configuration

A run is decided by one configuration: eight tables of plain values. It comes from, in this order,

1. the defaults below, which are [`configs/default.toml`](../configs/default.toml);
2. a TOML file given to `train`, such as those in [`configs/seeds/`](../configs/seeds), which names only what
   differs from the defaults;
3. options on the command line: `--table.key value`, with dashes or underscores in the key.

```bash
python -m pcam_jax.train configs/seeds/pcam_model4.toml --train.batch-size 64 --workdir runs/wide
python -m pcam_jax.train configs/seeds/pcam_model4.toml --augment.d4 --model.options dropout 0.3 --workdir runs/d4
```

(`--augment.d4` switches a yes-or-no value on, `--augment.no-d4` off.) In Python:

```python
import pcam_jax

config = pcam_jax.load_config("configs/seeds/pcam_model4.toml", {"train.epochs": 20})
print(pcam_jax.config_to_toml(config))
```

An unknown key, a value of the wrong type or outside its range is an error that names it; nothing is ignored.
The complete result is written to `config.toml` in the run, so a run can be repeated from its own folder:

```bash
python -m pcam_jax.train runs/wide/config.toml --workdir runs/wide-again
```

This page is written from the code by `make docs`; a test fails when it is out of date.
"""

_HEAD_OF_DEFAULT = """\
# Every setting with its default: the same as running without a file. A recipe needs only what differs from it.
# What each key means is in docs/configuration.md and in `python -m pcam_jax.train --help`.
#
# It trains a small network on the embedded sample of synthetic patches, in a minute or two on two cores:
#   python -m pcam_jax.train configs/default.toml

"""


def help_texts(kind: type) -> dict[str, str]:
    """The string after each field of a dataclass, by field name."""
    body = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for field, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
            assert isinstance(field.target, ast.Name)
            assert isinstance(after.value, ast.Constant)
            texts[field.target.id] = str(after.value.value)
    return texts


def configuration_page() -> str:
    """The whole of docs/configuration.md."""
    parts = [_INTRODUCTION]
    tables = typing.get_type_hints(Config)
    defaults = Config()
    for table, kind in tables.items():
        parts.append(f"## [{table}]\n\n{inspect.getdoc(kind)}\n")
        texts, hints = help_texts(kind), typing.get_type_hints(kind)
        rows = ["| key | values | default | |", "|---|---|---|---|"]
        for field in dataclasses.fields(kind):
            default = getattr(getattr(defaults, table), field.name)
            rows.append(
                f"| `{field.name}` | {_values(hints[field.name])} | {_default(default)} | {texts[field.name]} |"
            )
        parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


def default_toml() -> str:
    """The whole of configs/default.toml."""
    lines = []
    for line in config_to_toml(Config()).splitlines():
        lines.append(line)
        if line.startswith("validation_fraction"):
            lines.append("# train_fraction = 0.3  (not set: all that validation leaves)")
    return _HEAD_OF_DEFAULT + "\n".join(lines).rstrip() + "\n"


def _values(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is UnionType:
        return " or ".join("none" if part is type(None) else _values(part) for part in arguments)
    if origin is dict:
        return "table"
    return {bool: "`true`, `false`", int: "whole number", float: "number", str: "text"}[hint]


def _default(value: Any) -> str:
    if value is None or value in ("", {}):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def main() -> None:
    """Write both files."""
    (ROOT / "docs/configuration.md").write_text(configuration_page(), encoding="utf-8")
    (ROOT / "configs/default.toml").write_text(default_toml(), encoding="utf-8")


if __name__ == "__main__":
    main()
