import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts/bench_photographs.py"


def test_it_writes_a_table_and_its_record(tmp_path: Path) -> None:
    options = ["--count", "6", "--width", "600", "--rounds", "1", "--output", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, SCRIPT, *map(str, options)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out.json").read_text())
    assert len(record["megapixels"]) == 6
    assert {row["size"] for row in record["results"]} == {500, 224}
    for row in record["results"]:
        assert row["lowest"] <= row["images_per_second"] <= row["highest"]
        assert round(row["minutes_for_44000"] * row["images_per_second"] * 60) == 44_000
    assert "| 500 | 1 |" in (tmp_path / "out.md").read_text()
