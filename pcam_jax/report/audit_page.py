"""An audit as a self-contained page: the same figures as the text, with pictures."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from pcam_jax.data.audit import Finding, StoreAudit, sample_by_class
from pcam_jax.data.pixel_statistics import BLANK_SPREAD, SATURATED_SHARE
from pcam_jax.data.split import SPLITS
from pcam_jax.data.store import Store
from pcam_jax.report import html
from pcam_jax.report.canvas import LEGEND_POINTS, SERIES_COLORS, SERIES_STYLES, new_axes
from pcam_jax.report.html import Html
from pcam_jax.report.overlay import as_jpeg, draw_strip

SAMPLES_EACH = 16
WORST_SHOWN = 16
LEAKS_LISTED = 50
TILE_SIDE = 128
_MEASURES = (
    ("brightness", "mean grey value (of 255)"),
    ("haematoxylin", "haematoxylin (optical density)"),
    ("eosin", "eosin (optical density)"),
)


def audit_page(audit: StoreAudit, central_side: int | None = None, contact_sheet: bytes | None = None) -> str:
    """The audit as one HTML text.

    Args:
        audit: from `audit_store`.
        central_side: side of the central square to outline in samples, or None.
        contact_sheet: PNG of what augmentation does, or None.
    """
    store = audit.store
    sections = [
        ("findings", "What was found", _findings(audit.findings)),
        ("counts", "How many", _counts(audit)),
        ("samples", "What they look like", _samples(store, central_side)),
        ("colours", "Colours", _colours(audit)),
        ("odd", "Blank and saturated images", _odd(audit, central_side)),
        ("duplicates", "Duplicates", _duplicates(audit, central_side)),
    ]
    if audit.leaks:
        sections.append(("leaks", "Images of other sets", _leaks(audit)))
    if contact_sheet is not None:
        sheet = html.picture(
            contact_sheet,
            "png",
            "Contact sheet: images as they are, after each augmentation alone, and after all together.",
            "Each row is an image: as it is, after each operation alone, then after all of them, several times.",
        )
        sections.append(("augmentation", "What augmentation does", html.wide(sheet, "Contact sheet")))
    height, width, _ = store.image_shape
    return html.page(
        f"Audit of {store.path.name}",
        f"What the image store {store.path.name} holds, and what is wrong with it.",
        f"{len(store):,} images of {height} x {width} pixels, looked at one by one on {datetime.now(UTC):%Y-%m-%d}.",
        sections,
    )


def _findings(findings: Sequence[Finding]) -> Html:
    words = {"problem": "Problem: ", "note": "To know: ", "fine": "Fine: "}
    kinds = {"problem": "note", "note": "say", "fine": ""}
    return html.join(
        *(
            html.paragraph(words[finding.level] + finding.sentence, kinds[finding.level])
            for finding in findings
        )
    )


def _counts(audit: StoreAudit) -> Html:
    store = audit.store
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
    source = store.manifest.source
    return html.join(
        html.table(
            f"Images by split and class; splits {audit.split_rule}",
            ["split", *store.class_names, "unlabelled", "all", "groups"],
            rows,
        ),
        html.drawing(_class_bars(audit), f"Bar chart of images by split and class: {_balance(audit)}."),
        html.facts(
            {
                "Store": str(store.path),
                "Digest": store.digest,
                "Made from": ", ".join(f"{key}: {value}" for key, value in source.items()) or "not known",
            }
        ),
    )


def _balance(audit: StoreAudit) -> str:
    parts = []
    for row in audit.split_rows:
        labelled = sum(row.by_class)
        shares = [
            f"{100 * count / labelled:.1f} % {name}"
            for name, count in zip(audit.store.class_names, row.by_class, strict=True)
            if labelled
        ]
        parts.append(f"{row.split}: {', '.join(shares) or 'unlabelled'}")
    return "; ".join(parts)


def _class_bars(audit: StoreAudit) -> Figure:
    names = [*audit.store.class_names, "unlabelled"]
    figure, (axes,) = new_axes(width=5.6, height=0.9 + 0.55 * len(audit.split_rows))
    left = np.zeros(len(audit.split_rows))
    places = np.arange(len(audit.split_rows))[::-1]
    for number, name in enumerate(names):
        counts = np.array([(*row.by_class, row.unlabelled)[number] for row in audit.split_rows], float)
        if counts.any():
            color = "#BBBBBB" if name == "unlabelled" else SERIES_COLORS[number % len(SERIES_COLORS)]
            hatch = ("", "//", "..", "xx")[number % 4]
            axes.barh(places, counts, left=left, color=color, label=name, hatch=hatch, edgecolor="white")
            left += counts
    axes.set_yticks(places, [row.split for row in audit.split_rows])
    axes.set_xlabel("images")
    axes.legend(
        frameon=False, fontsize=LEGEND_POINTS, ncols=len(names), loc="lower left", bbox_to_anchor=(0, 1)
    )
    return figure


def _samples(store: Store, central_side: int | None) -> Html:
    parts = []
    chosen = sample_by_class(store.labels, len(store.class_names), SAMPLES_EACH)
    for name, members in zip((*store.class_names, "unlabelled"), chosen, strict=False):
        if len(members):
            parts += [html.subheading(f"{name}, at random"), _tiles(store, members, central_side, name)]
    return html.join(*parts)


def _tiles(
    store: Store, positions: np.ndarray, central_side: int | None, what: str, captions: Sequence[str] = ()
) -> Html:
    items = []
    for place, (position, image) in enumerate(zip(positions, store.gather(positions), strict=True)):
        picture = draw_strip(image, [], central_side)
        scale = min(1.0, TILE_SIDE / picture.height)
        small = picture.resize(
            (round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS
        )
        caption = Html(f"<code>{html.text(str(store.ids[position])[:12])}</code>")
        if captions:
            caption = Html(f"{html.text(captions[place])}<br>{caption}")
        items.append(html.picture(as_jpeg(small), "jpeg", f"Image {store.ids[position]}, {what}", caption))
    return html.tiles(items, 1)


def _colours(audit: StoreAudit) -> Html:
    pixels, store = audit.pixels, audit.store
    rows = []
    for split in (*SPLITS, ""):
        members = np.flatnonzero(audit.splits == split)
        if len(members):
            mean, std = pixels.channel_mean(members) / 255, pixels.channel_std(members) / 255
            rows.append([split or "unused", *(f"{value:.4f}" for value in (*mean, *std))])
    by_class = {
        name: store.labels == number
        for number, name in enumerate(store.class_names)
        if (store.labels == number).any()
    }
    by_split = {split: audit.splits == split for split in SPLITS if (audit.splits == split).any()}
    drawn = []
    for kind, masks in (("class", by_class), ("split", by_split)):
        for measure, label in _MEASURES if masks else ():
            values = getattr(pixels, measure)
            medians = "; ".join(f"{name} {np.median(values[mask]):.3g}" for name, mask in masks.items())
            alt = f"Histogram of {label} by {kind}; medians: {medians}."
            drawn.append(html.drawing(_histogram(values, masks, label), alt, f"{label}, by {kind}"))
    return html.join(
        html.table(
            "Mean and standard deviation of the channels, of 1",
            ["split", "mean R", "mean G", "mean B", "std R", "std G", "std B"],
            rows,
        ),
        html.paragraph(
            "One value per image. Where splits differ, so do their slides or scanners; where classes differ, a "
            "network may learn the colour instead of the tissue."
        ),
        html.figures(drawn, "small"),
    )


def _histogram(values: np.ndarray, masks: dict[str, np.ndarray], label: str) -> Figure:
    low, high = np.quantile(values, [0.001, 0.999])
    edges = np.linspace(low, high if high > low else low + 1, 41)
    figure, (axes,) = new_axes(width=4, height=2.8)
    for place, (name, mask) in enumerate(masks.items()):
        counts, _ = np.histogram(np.clip(values[mask], edges[0], edges[-1]), bins=edges)
        axes.stairs(
            counts / mask.sum(),
            edges,
            color=SERIES_COLORS[place % len(SERIES_COLORS)],
            linestyle=SERIES_STYLES[place % len(SERIES_STYLES)],
            linewidth=1.5,
            label=name,
        )
    axes.set_xlabel(label)
    axes.set_ylabel("share of images")
    axes.legend(frameon=False, fontsize=LEGEND_POINTS)
    return figure


def _odd(audit: StoreAudit, central_side: int | None) -> Html:
    pixels, store = audit.pixels, audit.store
    parts = [
        html.paragraph(
            f"Blank: grey values spread by less than {BLANK_SPREAD:g} of 255. Saturated: more than "
            f"{100 * SATURATED_SHARE:.0f} % of the pixels have a channel at 0 or 255."
        )
    ]
    for name, mask, order in (
        ("blank", pixels.blank, pixels.spread),
        ("saturated", pixels.burnt, -pixels.saturated),
    ):
        members = np.flatnonzero(mask)
        members = members[np.argsort(order[members], kind="stable")]
        parts.append(html.subheading(f"{len(members):,} {name}"))
        if len(members):
            parts.append(_tiles(store, members[:WORST_SHOWN], central_side, name, _labels(store, members)))
    return html.join(*parts)


def _duplicates(audit: StoreAudit, central_side: int | None) -> Html:
    kinds = (("to the byte", audit.exact), ("turned or mirrored", audit.turned))
    rows = [
        [name, *(f"{n:,}" for n in (len(f.sets), f.surplus, len(f.across), f.conflicting))]
        for name, f in kinds
    ]
    parts: list[str] = [
        html.table(
            "Images that are the same",
            [
                "equal",
                "sets",
                "surplus images",
                "images with an equal in another split",
                "sets of different labels",
            ],
            rows,
            stacked=True,
        )
    ]
    for name, figures in kinds:
        if figures.sets:
            members = np.concatenate(figures.sets)[:WORST_SHOWN]
            parts += [
                html.subheading(f"The first sets, equal {name}"),
                _tiles(audit.store, members, central_side, f"equal {name}", _labels(audit.store, members)),
            ]
    return html.join(*parts)


def _labels(store: Store, positions: np.ndarray) -> list[str]:
    return ["unlabelled" if label < 0 else store.class_names[label] for label in store.labels[positions]]


def _leaks(audit: StoreAudit) -> Html:
    rows = [
        [
            leak.name,
            f"{leak.count:,}",
            *(f"{leak.by_split[split]:,}" for split in SPLITS),
            "not looked at" if leak.turned is None else f"{leak.turned:,}",
        ]
        for leak in audit.leaks
    ]
    listed = [
        [image.id, image.split, image.equal, leak.name] for leak in audit.leaks for image in leak.images
    ]
    counts = html.table(
        "Images that other sets hold out, in this store, by their pixels",
        ["set", "held out", *(f"in our {split}" for split in SPLITS), "turned or mirrored"],
        rows,
        stacked=True,
    )
    if not listed:
        return counts
    names = html.table(
        "Those that a model would learn from",
        ["id", "our split", "equal", "set"],
        listed[:LEAKS_LISTED],
        left=(0, 1, 2, 3),
        more=""
        if len(listed) <= LEAKS_LISTED
        else f"The first {LEAKS_LISTED} of {len(listed):,}; the table beside this page has all.",
        stacked=True,
    )
    return html.join(counts, names)
