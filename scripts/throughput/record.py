"""What stands beside every figure: the command, the machine, the versions."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any


def command() -> str:
    """The command line of this process, as a reader would type it."""
    return f"python {shlex.join(sys.argv)}"


def machine() -> str:
    """The processor, and how many of them this process may use."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} CPUs"


def write(output: Path | None, versions: dict[str, str], facts: dict[str, Any], table: str) -> None:
    """Write OUTPUT.json (everything) and OUTPUT.md (the table under its command), if asked for."""
    if output is None:
        return
    versions = {"Python": platform.python_version(), **versions}
    record = {"command": command(), "machine": machine(), "versions": versions, **facts}
    output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    said = ", ".join(f"{name} {version}" for name, version in versions.items())
    output.with_suffix(".md").write_text(f"`{command()}`\n\n{machine()}; {said}\n\n{table}\n")
