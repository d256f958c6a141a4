import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "scripts/bench_prepare.py"


def test_writes_a_table_and_its_record(tmp_path):
    command = [
        sys.executable,
        str(SCRIPT),
        "--count",
        "20",
        "--rounds",
        "1",
        "--output",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["images"] == 20
    loops = {result["name"]: result for result in record["results"]}
    assert 0 < loops["prepare's loop, zip"]["of_floor"] < 5
    assert all(len(result["core_seconds"]) == 1 for result in loops.values())
    assert (tmp_path / "out.md").read_text().rstrip().endswith(done.stdout.strip())
