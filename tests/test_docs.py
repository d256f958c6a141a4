"""Every command and every Python block of README.md and docs/ runs, in this process, in a folder of its own.

The folder holds made-up sets of a few images in the layouts of `histopathologic-cancer-detection.zip`,
`breast-histopathology-images`, `siim-isic-melanoma-classification` and `pcam-h5`, and the project's `configs`.
Commands run as they stand, save for these replacements:

- training ends after one epoch, and takes the small pcam_model4 where no recipe is named;
- the embedded sample of 4,500 patches gives way to `data/sample`, 100 of them;
- `serve` runs as a process on a free port until the next `serve` of the page, and `127.0.0.1:8000` means that port;
- the folder where Kaggle's notebooks find the competition's data gives way to that zip.

Blocks in `text` are not run. A block after `<!-- not run: REASON -->` is only checked for its options, and `make`
lines only for their targets: continuous integration and a newcomer run those.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from kaggle_source import tif_bytes
from service import Service

from pcam_jax.__main__ import VERBS, dispatch
from pcam_jax.config.files import config_from_dict
from pcam_jax.data.raw import READERS
from pcam_jax.data.sample import sample_patches, write_sample_store
from pcam_jax.data.sample_sources import write_idc_tree, write_isic_folder, write_pcam_h5

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
]
ZIP = "histopathologic-cancer-detection.zip"
KAGGLE_INPUT = "/kaggle/input/histopathologic-cancer-detection"


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str
    not_run: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str) -> Iterator[Block]:
    opened, language, inner, reason = 0, "", [], ""
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), start=1):
        if line.startswith("```"):
            if opened:
                yield Block(page, opened, language, "\n".join(inner), reason)
                opened, reason = 0, ""
            else:
                opened, language, inner = number, line[3:].strip(), []
        elif opened:
            inner.append(line)
        elif line.strip():
            marked = re.fullmatch(r"<!-- not run: (.+) -->", line.strip())
            reason = marked[1] if marked else ""


def shell_lines(text: str) -> list[list[str]]:
    """The commands of a block, split into words, without comments."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True)) and words != ["set", "-e"]]


@dataclass
class Workspace:
    """Where the pages' commands run, and what has run already."""

    path: Path
    done: set[str] = field(default_factory=set)
    service: Service | None = None

    def run_page(self, page: str) -> None:
        names: dict[str, Any] = {}
        for block in blocks(page):
            if block.not_run:
                for words in shell_lines(block.text):
                    check_options(words, block)
            elif block.language == "bash":
                for words in shell_lines(block.text):
                    self.run(words, block)
            elif block.language == "python":
                self.run_python(block, names)
            elif block.language == "toml":
                config_from_dict(tomllib.loads(block.text), str(block))
            else:
                assert block.language == "text", f"{block}: name the language of the block, or `text`"
        self.serve(None)

    def run(self, words: list[str], block: Block) -> None:
        if words[0] == "curl":
            self.ask(words, block)
            return
        line = shlex.join(words)
        argv = arguments_of(words)
        if argv is not None and argv[0] == "serve":
            self.serve(argv[1:])
            return
        if line in self.done:
            return
        self.done.add(line)
        if words[0] == "make":
            subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
            return
        assert argv is not None, f"{block}: the test does not know how to run {line!r}"
        output = io.StringIO()
        try:
            with contextlib.redirect_stdout(output):
                dispatch(replaced(argv))
        except BaseException as error:
            raise AssertionError(
                f"{block}: {line}\n{type(error).__name__}: {error}\n{output.getvalue()}"
            ) from error

    def serve(self, arguments: list[str] | None) -> None:
        """End the service that runs, politely, and start another."""
        if self.service is not None:
            assert self.service.stop() == 143, self.service.errors
            self.service.__exit__()
            self.service = None
        if arguments is not None:
            self.service = Service(*arguments, cwd=self.path).__enter__()

    def ask(self, words: list[str], block: Block) -> None:
        """A request by curl must be answered with success."""
        done = subprocess.run(
            ["curl", "--fail-with-body", *map(self.replaced_address, words[1:])],
            capture_output=True,
            cwd=self.path,
        )
        assert done.returncode == 0, f"{block}: {shlex.join(words)}\n{done.stdout[:500]!r}"

    def replaced_address(self, text: str) -> str:
        assert self.service is not None or "127.0.0.1:8000" not in text
        return text.replace("127.0.0.1:8000", f"127.0.0.1:{self.service.port}") if self.service else text

    def run_python(self, block: Block, names: dict[str, Any]) -> None:
        if block.text in self.done:
            return
        self.done.add(block.text)
        python = []
        for line in block.text.splitlines():
            if line.startswith("!"):
                self.run(shlex.split(line[1:]), block)
            else:
                python.append(line)
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(self.replaced_address("\n".join(python)), str(block), "exec"), names)


def arguments_of(words: list[str]) -> list[str] | None:
    """The verb and its arguments, if the words call one."""
    if words[:2] == ["python", "-m"] and words[2].startswith("pcam_jax."):
        return [words[2].removeprefix("pcam_jax."), *words[3:]]
    return words[1:] if words[0] == "pcam-jax" else None


def replaced(argv: list[str]) -> list[str]:
    """The arguments with the replacements that the head of this file lists."""
    verb, *rest = argv
    rest = [{KAGGLE_INPUT: ZIP}.get(word, word) for word in rest]
    if verb == "predict":
        rest = ["data/sample" if word == "sample" else word for word in rest]
    if verb == "train":
        recipe = any(word.endswith(".toml") for word in rest)
        if not recipe:
            rest += ["--model.name", "pcam_model4"]
        if not recipe and "--data.store" not in rest:
            rest += ["--data.store", "data/sample"]
        rest += ["--train.epochs", "1"]
    return [verb, *rest]


def check_options(words: list[str], block: Block) -> None:
    """Every option of a command that is not run must exist."""
    if words[0] == "python" and words[1].startswith("scripts/"):
        unknown = [
            word for word in words[2:] if word.startswith("--") and word not in help_of_script(words[1])
        ]
        assert not unknown, f"{block}: {words[1]} has no {unknown}"
    argv = arguments_of(words)
    if argv is None:
        return
    assert argv[0] in VERBS, f"{block}: there is no verb {argv[0]}"
    for word in argv[1:]:
        if word.startswith("--"):
            option = word.split("=")[0]
            assert re.search(rf"{re.escape(option)}\b", help_of(argv[0])), f"{block}: no option {option}"


@cache
def help_of(verb: str) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.raises(SystemExit):
        dispatch([verb, "--help"])
    return output.getvalue()


@cache
def help_of_script(script: str) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / script, "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    path = tmp_path_factory.mktemp("docs")
    write_kaggle_zip(path / ZIP)
    write_idc_tree(path / "breast-histopathology-images", tiles=8)
    write_isic_folder(path / "siim-isic-melanoma-classification", width=160)
    write_pcam_h5(path / "pcam-h5")
    patches = sample_patches(2, seed=2)
    (path / "patch.tif").write_bytes(tif_bytes(patches.images[0]))
    with zipfile.ZipFile(path / "patches.zip", "w") as archive:
        archive.writestr("other.tif", tif_bytes(patches.images[1]))
    write_slide(path / "slide.tif")
    write_sample_store(path / "data/sample", count=80, test_count=20, slides=20)
    (path / "configs").symlink_to(ROOT / "configs")
    before = Path.cwd()
    os.chdir(path)
    made = Workspace(path)
    yield made
    if made.service is not None:  # a page failed
        made.service.__exit__()
    os.chdir(before)


def write_slide(path: Path) -> None:
    """Synthetic tissue amid glass as a pyramid of two levels of tiles, at 0.486 and 0.972 µm a pixel."""
    picture = np.full((512, 768, 3), 243, np.uint8)
    picture[64:448, 96:480] = sample_patches(1, seed=3, image_size=384).images[0]
    with tifffile.TiffWriter(path) as file:
        for level, reduction in ((picture, 1), (picture[::2, ::2], 2)):
            dots = 1e4 / (0.486 * reduction)
            file.write(
                level, tile=(128, 128), photometric="rgb", compression="zlib", resolution=(dots, dots),
                resolutionunit="CENTIMETER", subifds=2 - reduction, subfiletype=reduction - 1,
            )  # fmt: skip


def write_kaggle_zip(path: Path) -> None:
    """Synthetic patches in Kaggle's layout."""
    import hashlib

    patches = sample_patches(140, seed=1, slides=8)
    ids = [hashlib.sha1(image.tobytes()).hexdigest() for image in patches.images]
    train, test = list(zip(ids[:120], patches.labels[:120], strict=True)), ids[120:]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "train_labels.csv", "id,label\n" + "".join(f"{name},{label}\n" for name, label in train)
        )
        archive.writestr("sample_submission.csv", "id,label\n" + "".join(f"{name},0\n" for name in test))
        for number, (name, image) in enumerate(zip(ids, patches.images, strict=True)):
            archive.writestr(f"{'train' if number < 120 else 'test'}/{name}.tif", tif_bytes(image))


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_the_page_runs(page: str, workspace: Workspace) -> None:
    workspace.run_page("README.md")  # the other pages go on from there
    workspace.run_page(page)


def test_every_reader_is_on_the_page_of_data() -> None:
    page = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    assert not [name for name in READERS if f"| `{name}` |" not in page]


def test_readme_begins_with_the_two_lines() -> None:
    first = next(blocks("README.md"))
    assert shell_lines(first.text) == [["make", "train"], ["make", "test"]]


def test_the_table_of_systems_leads_from_raw_files_to_a_run(workspace: Workspace, tmp_path: Path) -> None:
    from pcam_jax.data.store import open_store
    from pcam_jax.train import parse_command
    from pcam_jax.training.network import build_network

    for name in ("breast-histopathology-images", "siim-isic-melanoma-classification"):
        shutil.make_archive(str(tmp_path / name), "zip", workspace.path / name)
    shutil.copy(workspace.path / ZIP, tmp_path)
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if re.match(r"\| [A-E]\. ", line)]
    assert [row[2] for row in rows] == list("ABCDE")
    for row in rows:
        prepare, train = (shlex.split(text) for text in re.findall(r"`(python -m [^`]+)`", row))
        verb, source, store = prepare[2:]
        assert verb == "pcam_jax.prepare"
        if not (tmp_path / store).exists():
            with contextlib.redirect_stdout(io.StringIO()):
                dispatch(["prepare", str(tmp_path / source), str(tmp_path / store)])
        assert train[2] == "pcam_jax.train"
        assert f"({train[3]})" in row
        for recipe in re.findall(r"\((configs/[^)]+)\)", row):
            config = parse_command([recipe]).settings()
            assert config.data.store == store, recipe
            prepared = open_store(tmp_path / store)
            build_network(config, prepared.image_shape, len(prepared.class_names))
    table = "\n".join(rows)
    assert not [path for path in (ROOT / "configs/seeds").iterdir() if path.name not in table]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    folder = (ROOT / page).parent
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / page).read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (folder / target).exists()]
    assert not missing


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs").rglob("*.toml")), ids=lambda path: path.stem)
def test_command_in_the_head_of_a_recipe_is_its_own(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pcam_jax.train import parse_command

    monkeypatch.chdir(ROOT)
    head = recipe.read_text(encoding="utf-8").split("\n[", 1)[0]
    commands = re.findall(r"^#\s+python -m pcam_jax\.train (.+)$", head, re.MULTILINE)
    assert commands
    for command in commands:
        assert parse_command(shlex.split(command)).config == recipe.relative_to(ROOT)


def test_a_wrong_command_would_be_noticed(workspace: Workspace) -> None:
    here = Block("page.md", 1, "bash", "", "")
    for line in (
        "python -m pcam_jax.train --no-such-option",
        "pcam-jax trian",
        "rm x",
        "make no-such-target",
    ):
        with pytest.raises((AssertionError, subprocess.CalledProcessError)):
            workspace.run(shlex.split(line), here)
    with pytest.raises(AssertionError, match="no option --tat"):
        check_options(shlex.split("python -m pcam_jax.predict run x --tat d4"), here)
    with pytest.raises(AssertionError, match="has no"):
        check_options(shlex.split("python scripts/crash_test.py --kiils 3"), here)
