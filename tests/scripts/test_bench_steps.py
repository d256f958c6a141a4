import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.mark.parametrize("task", ["train", "predict"])
def test_contenders_take_turns_and_one_that_is_missing_is_a_line(task: str, tmp_path: Path) -> None:
    sizes = ["--models", "pcam_model4", "--batches", "8", "--rounds", "2", "--seconds", "0.2"]
    peers = ["--peers", "ours-plain,ours-malloc,torch-eager"]
    line = [sys.executable, SCRIPTS / f"bench_{task}.py", *sizes, *peers, "--output", tmp_path / "out"]
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out.json").read_text())
    assert f"bench_{task}.py --models pcam_model4" in record["command"]
    rows = {row["system"]: row for row in record["results"]}
    assert {"ours", "ours-plain", "ours-malloc"} < set(rows)
    for name in ("ours", "ours-plain", "ours-malloc"):
        row = rows[name]
        assert 0 < row["lowest"] <= row["images_per_second"] <= row["highest"]
        assert row["ours_over_this"] == pytest.approx(
            rows["ours"]["images_per_second"] / row["images_per_second"]
        )
        assert row["params"] == 257_633
        assert row["gflops"] > 0
    if importlib.util.find_spec("torch") is None:
        assert "pip install" in rows["torch-eager"]["error"]
    else:
        assert rows["torch-eager"]["params"] == 257_633
    assert "| pcam_model4 | 8 | float32 | ours | " in (tmp_path / "out.md").read_text()
