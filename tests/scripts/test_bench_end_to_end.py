import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_end_to_end.py"


def test_it_compares_the_command_with_its_bare_step(tmp_path):
    output = tmp_path / "figures"
    options = [
        "--counts",
        "60",
        "--models",
        "pcam_model4",
        "--batch",
        "8",
        "--rounds",
        "1",
        "--seconds",
        "0.2",
    ]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options, "--output", str(output)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(output.with_suffix(".json").read_text())
    bare, command = record["results"]
    assert (bare["contender"], command["contender"]) == ("bare step", "pcam_jax.train")
    assert command["of_bare_step"] == command["images_per_second"] / bare["images_per_second"]
    assert command["epoch_seconds"] > 0
    assert command["anonymous_mib"] > 50
    assert record["command"].endswith(f"--output {output}")
    assert output.with_suffix(".md").read_text().rstrip().endswith(done.stdout.strip())
