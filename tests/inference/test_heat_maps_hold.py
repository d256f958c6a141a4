"""Heat maps of a net that was trained on real patches: its answer hangs on what they call hot."""

from __future__ import annotations

import pcam_jax
from pcam_jax.data.convert import prepare_store
from pcam_jax.inference.evaluation import evaluate_run
from pcam_jax.inference.explanation import explain_run


def test_removing_the_hottest_tenth_costs_more_than_removing_another(pcam_mini, tmp_path):
    """A small net of system A after seconds of training; positives of the validation split."""
    store = prepare_store(pcam_mini, tmp_path / "store", workers=1)
    settings = {
        "data.store": str(store.path),
        "data.train_fraction": 0.4,
        "data.validation_fraction": 0.1,
        "model.name": "pcam_model4",
        "optimizer.schedule": "constant",
        "train.epochs": 4,
        "train.monitor": "validation_auroc",
        "tracking.tensorboard": False,
    }
    run = pcam_jax.run_training(pcam_jax.load_config(None, settings), tmp_path / "run", say=lambda line: None)
    evaluation = evaluate_run(run, resamples=0)
    assert evaluation.report.metrics["auroc"].value > 0.7
    explanation = explain_run(run, evaluation, methods=("grad_cam",), count=1, sample_size=96, check=True)
    fall, _ = explanation.deletion["grad_cam"]
    assert fall.removal == "blur"
    for beyond in (fall.above_scattered, fall.above_moved, fall.above_elsewhere):
        assert beyond.low > 0, fall
