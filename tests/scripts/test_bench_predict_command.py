import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_predict_command.py"


def test_it_compares_the_command_with_the_bare_forward_pass(tmp_path):
    output = tmp_path / "figures"
    options = ["--count", "50", "--models", "pcam_model4", "--rounds", "1", "--seconds", "0.2"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options, "--output", str(output)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    bare, plain, averaged = json.loads(output.with_suffix(".json").read_text())["results"]
    assert plain["of_bare"] == plain["images_per_second"] / bare["images_per_second"]
    assert averaged["times_plain"] == averaged["seconds"] / plain["seconds"]
    assert plain["images_per_second"] == pytest.approx(50 / plain["seconds"])
    assert plain["anonymous_mib"] > 50
    assert output.with_suffix(".md").read_text().rstrip().endswith(done.stdout.strip())
