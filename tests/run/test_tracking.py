from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

from pcam_jax.config.files import load_config
from pcam_jax.run.tracking import WANDB_ID, make_trackers
from pcam_jax.runtime.errors import UserError

ROOT = Path(__file__).parents[2]


def events(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("events.*")))


def test_figures_reach_tensorboard(tmp_path: Path) -> None:
    config = load_config(None, {"tracking.tensorboard": True})
    [tracker] = make_trackers(config, tmp_path, 0)
    tracker.log(3, {"validation_loss": 0.25, "validation_auroc": float("nan")})
    tracker.close()
    written = events(tmp_path / "tensorboard")
    assert b"validation_loss" in written
    assert b"validation_auroc" in written


def test_a_resumed_run_supersedes_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.record_writer import RecordWriter

    assert RecordWriter is not None  # the writer frames events as length, checksum, content, checksum
    config = load_config(None, {"tracking.tensorboard": True})
    [tracker] = make_trackers(config, tmp_path, 7)
    tracker.close()
    content, found = events(tmp_path / "tensorboard"), []
    while content:
        length = int.from_bytes(content[:8], "little")
        found.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    starts = [event.step for event in found if event.session_log.status == SessionLog.START]
    assert starts == [7]


def test_nothing_is_tracked_where_nothing_is_asked(tmp_path: Path) -> None:
    config = load_config(None, {"tracking.tensorboard": False})
    assert make_trackers(config, tmp_path, 0) == []
    assert not list(tmp_path.iterdir())


def test_a_missing_package_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = load_config(None, {"tracking.tensorboard": False, "tracking.wandb": True})
    with pytest.raises(UserError, match=r"'wandb'.*pcam-jax\[wandb\]"):
        make_trackers(config, tmp_path, 0)


TRACK = """
import sys
from pathlib import Path
from pcam_jax.config.files import load_config
from pcam_jax.run.tracking import make_trackers
config = load_config(None, {"tracking.tensorboard": False, "tracking.wandb": True, "train.seed": 7})
start, workdir = int(sys.argv[1]), Path(sys.argv[2])
(tracker,) = make_trackers(config, workdir, start)
for step in (start + 10, start + 20):
    tracker.log(step, {"loss": 1 / step})
tracker.close()
"""


def test_wandb_offline_keeps_its_id_across_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"}
    ids = []
    for start in (0, 10, 0):  # begun, resumed from a checkpoint before the last figures, begun anew
        command = [sys.executable, "-W", "error", "-c", TRACK, str(start), str(tmp_path)]
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120, cwd=ROOT)
        ids.append((tmp_path / WANDB_ID).read_text().strip())
    assert ids[0] == ids[1] != ids[2]
    written = [path.name for path in (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")]
    assert sorted(name.removeprefix("run-").removesuffix(".wandb") for name in written) == sorted(ids)
    content = b"".join(path.read_bytes() for path in (tmp_path / "wandb").rglob("*.wandb"))
    assert b"loss" in content
    assert b"wandb_project" in content  # the configuration went along


def test_a_run_is_tracked_offline_and_says_nothing_about_it(
    verb: Callable[..., subprocess.CompletedProcess[str]], tiny_store: Path, tmp_path: Path
) -> None:
    pytest.importorskip("wandb")
    options = tiny.as_options(tiny.settings(tiny_store, tracking__wandb=True, train__epochs=2))
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"}
    done = verb("train", "--workdir", tmp_path / "run", *options, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "wandb" not in done.stdout
    content = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*.wandb"))
    assert content.count(b"validation_auroc") >= 2
    # a run with the tracker's files in it is still a run to go on with
    done = verb("train", "--workdir", tmp_path / "run", "--resume", *options, env=environment)
    assert "already finished" in done.stdout
