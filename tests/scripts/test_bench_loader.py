import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_loader.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=120
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and drops pages with posix_fadvise")
def test_it_writes_a_table_and_its_figures(tmp_path):
    output = tmp_path / "loader"
    sizes = ["--count", "640", "--size", "8", "--batch", "32", "--steps", "3", "--rounds", "1"]
    done = run(*sizes, "--step-ms", "1", "--output", str(output))
    assert done.returncode == 0, done.stderr
    record = json.loads(output.with_suffix(".json").read_text())
    assert record["images"] == 640
    assert "--step-ms 1" in record["command"]
    by_name = {result["contender"]: result for result in record["results"]}
    assert by_name["gather, warm"]["over_gather"] == 1
    assert all(result["images_per_second"] > 0 for result in by_name.values())
    assert 0 <= by_name["train, cold, waiting"]["waited_share"] <= 1
    table = output.with_suffix(".md").read_text()
    assert all(f"| {name} |" in table for name in by_name)
