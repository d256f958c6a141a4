"""What a search found: a page, a table of its trials, and the best settings as a recipe."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import Any

from pcam_jax.config.files import config_from_dict, config_to_toml
from pcam_jax.runtime.files import atomic_write, write_text_atomic

_SHOWN = 10


def write_study_report(folder: Path, study: Any, trials: list[Any], best: Any, objective: str) -> None:
    """Write `report.md`, `trials.csv` and, once a trial has finished, `best.toml`.

    Args:
        folder: where to.
        study: Optuna's study.
        trials: those that ended, in order.
        best: the best of them, or None.
        objective: what was maximised.
    """
    names = list(dict.fromkeys(name for trial in trials for name in trial.params))
    with atomic_write(folder / "trials.csv") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["trial", "state", objective, "epochs", "seconds", *names, "error"])
        for trial in trials:
            seconds = f"{trial.duration.total_seconds():.1f}" if trial.duration else ""
            value = "" if trial.value is None else f"{trial.value:.6f}"
            row = [trial.number, trial.state.name.lower(), value, len(trial.intermediate_values), seconds]
            table.writerow(
                [*row, *(trial.params.get(name, "") for name in names), trial.user_attrs.get("error", "")]
            )
    write_text_atomic(folder / "report.md", _page(study, trials, best, objective, names))
    if best is not None:
        config = config_from_dict(best.user_attrs["config"], f"trial {best.number}")
        figure = f"{objective} {best.value:.4f}"
        head = f"# Best of {len(trials)} trials of {study.study_name}: trial {best.number}, {figure}."
        note = "# The figure is the highest of many on one validation split, and so flatters; measure it on another."
        write_text_atomic(folder / "best.toml", f"{head}\n{note}\n\n{config_to_toml(config)}")


def _page(study: Any, trials: list[Any], best: Any, objective: str, names: list[str]) -> str:
    states = [trial.state.name for trial in trials]
    lines = [
        f"# {study.study_name}",
        "",
        f"{len(trials)} trials: {states.count('COMPLETE')} to the end, {states.count('PRUNED')} ended early, "
        f"{states.count('FAIL')} failed. Maximised: {objective} of each run's best checkpoint.",
        "",
    ]
    complete = sorted((t for t in trials if t.value is not None and t.state.name == "COMPLETE"),
                      key=lambda trial: -trial.value)  # fmt: skip
    if complete:
        lines += ["## Best trials", "", f"| trial | {objective} | {' | '.join(names)} |",
                  "|---" * (len(names) + 2) + "|"]  # fmt: skip
        for trial in complete[:_SHOWN]:
            values = " | ".join(_shown(trial.params.get(name, "")) for name in names)
            lines.append(f"| {trial.number} | {trial.value:.4f} | {values} |")
        lines += [
            "",
            "## History",
            "",
            "The best so far, where it changed:",
            "",
            f"| trial | {objective} |",
            "|---|---|",
        ]
        highest = float("-inf")
        for trial in sorted(complete, key=lambda trial: trial.number):
            if trial.value > highest:
                highest = trial.value
                lines.append(f"| {trial.number} | {highest:.4f} |")
        lines += ["", "## What mattered", "", *_importances(study)]
    failures = [trial for trial in trials if trial.user_attrs.get("error")]
    if failures:
        lines += ["", "## Failures", "", *(f"- trial {t.number}: {t.user_attrs['error']}" for t in failures)]
    return "\n".join(lines) + "\n"


def _importances(study: Any) -> list[str]:
    """Each setting's share in how much the trials differ, as PED-ANOVA estimates it."""
    import optuna

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the evaluator calls itself experimental
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()
            shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    except (ValueError, RuntimeError, ZeroDivisionError):
        return ["Too few trials, or too alike, to tell."]
    rows = [f"| {name} | {share:.2f} |" for name, share in shares.items()]
    text = "Share of each setting in what sets good trials apart (PED-ANOVA, Watanabe et al. 2023):"
    return [text, "", "| setting | share |", "|---|---|", *rows]


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
