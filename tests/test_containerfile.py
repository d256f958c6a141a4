"""The container file, as far as it can be tried without building it."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

from service import Service

ROOT = Path(__file__).parents[1]


def instructions() -> list[tuple[str, str]]:
    """Pairs of instruction and arguments, of the last stage."""
    text = (ROOT / "Containerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    pairs = [(line.split()[0], line.partition(" ")[2].strip()) for line in lines]
    last = max(number for number, (name, _) in enumerate(pairs) if name == "FROM")
    return pairs[last:]


def test_its_command_is_one_of_serve_and_its_health_check_tells_the_truth(tiny_run: Path) -> None:
    found = dict(instructions())
    assert int(found["USER"].partition(":")[0]) > 0
    assert json.loads(found["ENTRYPOINT"]) == ["python", "-m", "pcam_jax.serve"]
    run, *options = json.loads(found["CMD"])
    assert run.startswith("/")
    command = json.loads(re.search(r"CMD (\[.*\])", found["HEALTHCHECK"])[1])  # type: ignore[index]
    with Service(tiny_run, *options) as service:
        assert any("anyone who reaches this address" in line for line in service.lines)
        check = [sys.executable, *(part.replace(":8000", f":{service.port}") for part in command[1:])]
        assert subprocess.run(check, timeout=30, check=False).returncode == 0
        assert service.stop() == 143
        done = subprocess.run(check, timeout=30, check=False, capture_output=True)
        assert done.returncode != 0


def test_what_it_copies_is_there() -> None:
    text = (ROOT / "Containerfile").read_text(encoding="utf-8")
    copied = [
        shlex.split(line)[1:-1]
        for line in text.splitlines()
        if line.startswith("COPY") and "--from" not in line
    ]
    assert copied
    assert all((ROOT / name).exists() for names in copied for name in names)
