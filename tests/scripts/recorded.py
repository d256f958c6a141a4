"""Runs a benchmark script as a user would and reads the record it leaves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parents[2] / "scripts"


def recorded(name: str, output: Path, *options: str) -> tuple[dict[str, Any], str]:
    """OUTPUT.json of a script that must succeed, and what it printed."""
    done = subprocess.run(
        [sys.executable, SCRIPTS / name, *options, "--output", output],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(output.with_suffix(".json").read_text()), done.stdout
