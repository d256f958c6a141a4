"""The house's rule: imports only point down the picture in docs/architecture.md."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pcam_jax"
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))
VERB_IMPORTERS = ("tune", "__main__", "__init__")  # tune runs train; the others only name verbs


def floors() -> list[list[str]]:
    """The rooms of each floor, the highest first, as the architecture page draws them."""
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    picture = page.split("<!-- floors -->", 1)[1].split("```")[1]
    lines = [line.strip() for line in picture.splitlines()[1:]]
    return [line.replace("·", " ").split() for line in lines if line and not set(line) <= set("│▼ ")]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The room of a module: its folder, or `verbs` for a file at the top."""
    parts = module.split(".")
    if len(parts) == 1:
        return "__init__"
    if (PACKAGE / parts[1]).is_dir():
        return parts[1]
    return "verbs"


def imports_of(path: Path, *, typing_too: bool = True) -> Iterator[tuple[str, int]]:
    """Every pcam_jax module or other top-level name that a file imports anywhere in it, with the line."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and not typing_too and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped |= {id(inner) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            module = node.module or ""
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                is_module = (ROOT / inner.replace(".", "/")).with_suffix(".py").is_file() or (
                    ROOT / inner.replace(".", "/")
                ).is_dir()
                yield (inner if module.startswith("pcam_jax") and is_module else module), node.lineno


def test_picture_names_every_room_once() -> None:
    drawn = [room for floor in floors() for room in floor]
    rooms = {room_of(module_name(path)) for path in MODULES} - {"__init__"}
    assert sorted(drawn) == sorted(rooms)


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_only_point_down(path: Path) -> None:
    height = {room: level for level, floor in enumerate(reversed(floors())) for room in floor}
    name = module_name(path)
    if name == "pcam_jax":
        imported = [module for module, _ in imports_of(path, typing_too=False) if "pcam_jax" in module]
        assert imported == [], "the public API must stay lazy"
        return
    room = room_of(name)
    wrong = []
    for module, line in imports_of(path):
        if module.split(".")[0] != "pcam_jax":
            continue
        target = room_of(module)
        if target == "__init__":
            wrong.append(f"line {line}: import {module} from its own file, not from the package")
        elif target == "verbs":
            if path.stem not in VERB_IMPORTERS:
                wrong.append(f"line {line}: {module} is a verb, which nobody imports")
        elif target != room and height[target] >= height[room]:
            wrong.append(f"line {line}: {room} must not import {module}, which is not below it")
    assert not wrong, f"{path}: {'; '.join(wrong)}"


def test_steps_know_neither_files_nor_clocks() -> None:
    path = PACKAGE / "training/steps.py"
    banned = {"os", "io", "pathlib", "time", "datetime", "shutil", "tempfile", "json", "csv", "sys", "tqdm"}
    imported = {module for module, _ in imports_of(path)}
    assert not {module for module in imported if module.split(".")[0] in banned}
    assert not {
        module for module in imported if module.startswith(("pcam_jax.data", "pcam_jax.runtime.files"))
    }
    names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
    assert not names & {"open", "print"}


def test_no_room_for_odds_and_ends() -> None:
    assert not [path for path in MODULES if path.stem in ("utils", "util", "helpers", "misc", "common")]


def test_no_tensorflow() -> None:
    found = [
        path for path in MODULES for module, _ in imports_of(path) if module.split(".")[0] == "tensorflow"
    ]
    assert not found


def test_data_side_never_imports_jax() -> None:
    """The API, `prepare` and all they stand on start without jax (an import of it costs a second)."""
    free = ["pcam_jax", "pcam_jax.__main__", "pcam_jax.prepare"]
    free += [f"pcam_jax.runtime.{name}" for name in ("errors", "files", "signals", "command", "progress")]
    free += [module_name(path) for path in MODULES if path.parts[-2] in ("config", "data", "raw", "metrics")]
    code = (
        f"import sys, importlib\n"
        f"for name in {free!r}:\n"
        f"    importlib.import_module(name)\n"
        f"    heavy = {{'jax', 'jaxlib', 'flax', 'optax', 'orbax', 'torch', 'tensorflow'}} & set(sys.modules)\n"
        f"    assert not heavy, f'{{name}} brings {{heavy}}'\n"
    )
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr[-2000:]
