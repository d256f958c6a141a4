import json
import subprocess
import sys
from pathlib import Path

from pcam_jax.data.sample import write_sample_store

ROOT = Path(__file__).parents[2]


def test_rows_differ_in_what_they_say_and_a_second_call_trains_nothing(tmp_path: Path) -> None:
    write_sample_store(tmp_path / "store", count=80, test_count=0, slides=20)
    options = ["--base", "configs/seeds/pcam_model4.toml", "--rows", "0,7", "--seeds", "1", "--epochs", "1"]
    places = ["--store", tmp_path / "store", "--workdir", tmp_path / "runs", "--output", tmp_path / "out"]
    line = [sys.executable, ROOT / "scripts/ablate.py", *map(str, [*options, *places])]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out.json").read_text())
    assert [row["row"] for row in record["results"]] == ["the base", "label smoothing 0.1"]
    assert all(0 <= seed["auroc_d4"] <= 1 for row in record["results"] for seed in row["seeds"])
    configs = [(tmp_path / "runs" / name / "config.toml").read_text() for name in ("0-0", "7-0")]
    assert ["label_smoothing = 0.1" in config for config in configs] == [False, True]
    again = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert again.stdout == done.stdout
