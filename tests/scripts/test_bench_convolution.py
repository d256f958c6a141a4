import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/bench_convolution.py"


@pytest.mark.parametrize(
    ("kernel", "stride", "form"), [(6, 3, "one product"), (3, 2, "phases"), (3, 1, "tiles")]
)
def test_every_form_computes_the_layer(kernel: int, stride: int, form: str, tmp_path: Path) -> None:
    sizes = {
        "batch": 2,
        "side": 9,
        "inputs": 16,
        "outputs": 16,
        "kernel": kernel,
        "stride": stride,
        "rounds": 2,
    }
    words = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    done = subprocess.run(
        [sys.executable, SCRIPT, *words, "--output", tmp_path / "out"],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr  # it compares every form with XLA's own
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert {row["task"] for row in results} == {"forward", "gradients"}
    assert any(form in row["form"] for row in results)
    assert all(0 < row["lowest"] <= row["ms"] <= row["highest"] for row in results)
    assert "| ours |" in (tmp_path / "out.md").read_text()
