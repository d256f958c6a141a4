from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pcam_jax.config.schema import Config
from pcam_jax.run.claim import Claim, claim_workdir
from pcam_jax.run.folder import RESULT, open_run
from pcam_jax.runtime.errors import UserError


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """A finished run to change."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def settings_of(run: Path) -> tuple[Config, str]:
    opened = open_run(run)
    return opened.config, opened.environment["data"]["digest"]


def changed(config: Config, **settings: Any) -> Config:
    for name, value in settings.items():
        table, key = name.split("__")
        config = dataclasses.replace(
            config, **{table: dataclasses.replace(getattr(config, table), **{key: value})}
        )
    return config


def claim(run: Path, *, resume: bool = True, **settings: Any) -> Claim:
    config, digest = settings_of(run)
    return claim_workdir(run, changed(config, **settings), digest, resume=resume)


def refusal(run: Path, **settings: Any) -> str:
    with pytest.raises(UserError) as refused:
        claim(run, **settings)
    return str(refused.value)


def unfinished(run: Path) -> Path:
    (run / RESULT).unlink()
    return run


@pytest.mark.parametrize("resume", [False, True])
def test_an_empty_folder_begins_a_run(tiny_run: Path, tmp_path: Path, resume: bool) -> None:
    config, digest = settings_of(tiny_run)
    # what a run killed in its first moments leaves
    for name in (".lock", "environment.json", "split.csv", ".config.toml.x1y2_z34.tmp"):
        (tmp_path / name).write_text("")
        assert claim_workdir(tmp_path, config, digest, resume=resume) == Claim(None, None, False, [])


def test_a_folder_with_other_things_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.doc").write_text("")
    with pytest.raises(UserError, match=r"is not empty \(thesis.doc\) and holds no run: choose a new folder"):
        claim_workdir(tmp_path, *settings_of(tiny_run), resume=False)


def test_another_run_is_refused_without_resume(run: Path) -> None:
    with pytest.raises(
        UserError, match="already holds a run: add --resume to go on with it, or choose another"
    ):
        claim_workdir(run, *settings_of(run), resume=False)


def test_a_finished_run_is_left_alone(run: Path) -> None:
    found = claim(run)
    assert found.finished
    assert found.remarks == [f"{run} is already finished (all 3 epochs done); nothing to do."]
    assert (run / RESULT).is_file()


def test_an_unfinished_run_goes_on_from_its_latest_checkpoint(run: Path) -> None:
    found = claim(unfinished(run))
    assert not found.finished
    assert found.checkpoint is not None
    assert found.checkpoint.step == max(int(path.name) for path in (run / "checkpoints").iterdir())
    assert found.remarks == []


def test_before_the_first_checkpoint_a_run_starts_at_step_0(run: Path) -> None:
    shutil.rmtree(unfinished(run) / "checkpoints")
    found = claim(run)
    assert found.checkpoint is None
    assert found.remarks == ["No checkpoint was saved yet: starting at step 0."]


def test_with_no_good_checkpoint_a_run_starts_at_step_0(run: Path) -> None:
    for progress in (unfinished(run) / "checkpoints").glob("*/progress.json"):
        progress.write_text("")
    found = claim(run)
    assert found.checkpoint is None
    assert found.remarks[-1] == "No good checkpoint is left: starting at step 0."
    assert all(remark.endswith("; going back to the one before it") for remark in found.remarks[:-1])


def test_changed_settings_are_named_with_both_values(run: Path) -> None:
    said = refusal(unfinished(run), train__batch_size=4, optimizer__peak_lr=0.5)
    assert "optimizer.peak_lr (0.001 -> 0.5)" in said
    assert "train.batch_size (8 -> 4)" in said
    assert said.endswith("Resume with its own settings, or choose another --workdir.")


@pytest.mark.parametrize(
    "settings",
    [
        {"data__placement": "device"},
        {"data__store": "/elsewhere"},
        {"checkpoint__every_steps": 1},
        {"tracking__tensorboard": True},
        {"train__max_seconds": 9.0},
        {"train__nan_patience": 3},
    ],
)
def test_settings_that_change_no_number_may_change_and_are_recorded(
    run: Path, settings: dict[str, Any]
) -> None:
    found = claim(unfinished(run), **settings)
    assert found.run is not None
    assert open_run(run).config == changed(open_run(run).config, **settings) == found.run.config


@pytest.mark.parametrize(
    "settings",
    [{"train__seed": 1}, {"data__fold": 1}, {"augment__zoom": 0.1}, {"model__options": {"dropout": 0.0}}],
)
def test_settings_that_change_numbers_may_not(run: Path, settings: dict[str, Any]) -> None:
    assert "was started with other settings" in refusal(unfinished(run), **settings)


def test_other_data_are_refused(run: Path) -> None:
    config, _ = settings_of(run)
    with pytest.raises(UserError, match=r"was trained on other data \(store digest .*, now 0123456789ab\)"):
        claim_workdir(run, config, "0123456789abcdef", resume=True)


def reconfigure(run: Path, **settings: Any) -> None:
    """As if the run had been started with these settings."""
    from pcam_jax.run.folder import write_config

    opened = open_run(run)
    write_config(opened, changed(opened.config, **settings))


@pytest.mark.parametrize("schedule", ["constant", "plateau"])
def test_more_epochs_go_on_where_the_schedule_does_not_count_them(run: Path, schedule: str) -> None:
    reconfigure(run, optimizer__schedule=schedule)
    found = claim(run, train__epochs=5)
    assert not found.finished
    assert found.checkpoint is not None
    assert open_run(run).config.train.epochs == 5
    assert not (run / RESULT).exists()


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
def test_more_epochs_are_refused_where_the_schedule_counts_them(run: Path, schedule: str) -> None:
    reconfigure(run, optimizer__schedule=schedule)
    assert "train.epochs (3 -> 5)" in refusal(run, train__epochs=5)


def test_fewer_epochs_are_refused(run: Path) -> None:
    reconfigure(run, optimizer__schedule="constant")
    assert "train.epochs (3 -> 2)" in refusal(run, train__epochs=2)


def end(run: Path, **values: Any) -> None:
    result = json.loads((run / RESULT).read_text())
    (run / RESULT).write_text(json.dumps(result | values))


def test_a_run_that_stopped_early_is_finished_also_for_more_epochs(run: Path) -> None:
    reconfigure(run, optimizer__schedule="constant")
    end(run, ended_by="early_stop", reason="validation_loss did not improve for 2 epochs")
    assert claim(run, train__epochs=9).finished


def test_a_run_whose_time_ran_out_goes_on(run: Path) -> None:
    end(run, ended_by="max_seconds")
    found = claim(run)
    assert not found.finished
    assert found.checkpoint is not None


def test_a_newer_checkpoint_format_is_left_alone(run: Path) -> None:
    from pcam_jax.run import checkpoint

    for path in (unfinished(run) / "checkpoints").glob("*/progress.json"):
        values = json.loads(path.read_text())
        del values["digest"]
        values["format_version"] = 99
        path.write_text(json.dumps({**values, "digest": checkpoint._progress_digest(values)}))
    assert "has checkpoint format 99, newer than" in refusal(run)
    assert list((run / "checkpoints").glob("*/state"))
