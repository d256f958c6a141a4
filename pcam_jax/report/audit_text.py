"""An audit as text for a terminal."""

from __future__ import annotations

import numpy as np

from pcam_jax.data.audit import StoreAudit
from pcam_jax.data.leaks import Leak
from pcam_jax.data.pixel_statistics import BLANK_SPREAD, SATURATED_SHARE

_SIGNS = {"problem": "PROBLEM", "note": "note", "fine": "ok"}


def audit_text(audit: StoreAudit) -> str:
    """Counts, colours, duplicates, leaks, and what was found, in plain characters."""
    store = audit.store
    height, width, _ = store.image_shape
    parts = [
        f"{store.path}: {len(store):,} images of {height} x {width}; splits {audit.split_rule}.",
        _counts(audit),
        _colours(audit),
        _duplicates(audit),
    ]
    parts += [_leak(leak) for leak in audit.leaks]
    width_of_sign = max(map(len, _SIGNS.values()))
    parts.append(
        "\n".join(
            f"{_SIGNS[finding.level]:{width_of_sign}}  {finding.sentence}" for finding in audit.findings
        )
    )
    return "\n\n".join(parts)


def _counts(audit: StoreAudit) -> str:
    header = ["split", *audit.store.class_names, "unlabelled", "all", "groups"]
    rows = [
        [
            row.split,
            *(f"{n:,}" for n in row.by_class),
            f"{row.unlabelled:,}",
            f"{row.count:,}",
            f"{row.groups:,}",
        ]
        for row in audit.split_rows
    ]
    return _columns([header, *rows])


def _colours(audit: StoreAudit) -> str:
    """Mean and deviation of each channel of the training images, and the quantiles of what is measured."""
    pixels, lines = audit.pixels, []
    training = np.flatnonzero(audit.splits == "train")
    chosen = training if len(training) else np.arange(len(audit.store))
    mean, std = pixels.channel_mean(chosen) / 255, pixels.channel_std(chosen) / 255
    whose = "training images" if len(training) else "all images"
    for name, values in (("mean", mean), ("deviation", std)):
        lines.append(f"channel {name} of {whose} (R, G, B): {', '.join(f'{value:.4f}' for value in values)}")
    shares = [0, 0.05, 0.5, 0.95, 1]
    table = [["", "lowest", "5 %", "median", "95 %", "highest"]]
    measures = (("brightness", 1), ("spread", 1), ("haematoxylin", 3), ("eosin", 3), ("saturated", 3))
    for measure, digits in measures:
        quantiles = np.quantile(getattr(pixels, measure), shares)
        table.append([measure, *(f"{value:.{digits}f}" for value in quantiles)])
    lines += ["", _columns(table), ""]
    lines.append(
        f"{int(pixels.blank.sum()):,} blank (grey values spread by less than {BLANK_SPREAD:g} of 255), "
        f"{int(pixels.burnt.sum()):,} others with more than {SATURATED_SHARE:.0%} of the pixels at 0 or 255."
    )
    return "\n".join(lines)


def _duplicates(audit: StoreAudit) -> str:
    table = [["duplicates", "sets", "surplus", "in other splits", "labels differ"]]
    for name, figures in (("to the byte", audit.exact), ("turned or mirrored", audit.turned)):
        table.append(
            [
                name,
                *(
                    f"{n:,}"
                    for n in (len(figures.sets), figures.surplus, len(figures.across), figures.conflicting)
                ),
            ]
        )
    return _columns(table)


def _leak(leak: Leak) -> str:
    found = ", ".join(f"{count:,} in {split or 'unused'}" for split, count in leak.by_split.items() if count)
    turned = "" if leak.turned is None else f"; turned or mirrored: {leak.turned:,}"
    return f"of the {leak.count:,} held-out images of {leak.name}, here: {found or 'none'}{turned}"


def _columns(table: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    )
