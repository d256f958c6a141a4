"""Pieces of a self-contained page: everything inside one file, no script, nothing fetched.

Each function returns HTML; text given to it is escaped here, so that a class or file name can hold anything.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape

import matplotlib
from matplotlib.figure import Figure

from pcam_jax.report.style import STYLE

RESEARCH_USE = "Research use only. Not a medical device."
Cell = str | float | int


class Html(str):
    """Text that is HTML already; every other text is escaped."""


def text(value: Cell) -> str:
    """Escape, unless it is `Html`."""
    return value if isinstance(value, Html) else escape(str(value))


def join(*parts: str) -> Html:
    """One piece of several, all HTML."""
    return Html("\n".join(part for part in parts if part))


def page(title: str, description: str, lead: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """A whole page.

    Args:
        title: heading and name of the page.
        description: one sentence, for those who list pages.
        lead: below the heading.
        sections: (id, heading, HTML) of each, in order.
    """
    links = "".join(f'<li><a href="#{name}">{text(heading)}</a></li>' for name, heading, _ in sections)
    body = "\n".join(
        f'<section id="{name}" aria-labelledby="{name}-heading">\n<h2 id="{name}-heading">{text(heading)}</h2>\n'
        f"{content}\n</section>"
        for name, heading, content in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="description" content="{text(description)}">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{text(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<a class="skip" href="#content">Skip to the content</a>
<header>
<h1>{text(title)}</h1>
<p class="lead">{text(lead)}</p>
<p class="use">{RESEARCH_USE}</p>
<nav aria-label="Contents"><ul>{links}</ul></nav>
</header>
<main id="content">
{body}
</main>
<footer><p>Made by pcam_jax. {RESEARCH_USE}</p></footer>
</body>
</html>
"""


def paragraph(content: str, kind: str = "") -> Html:
    """A paragraph; ``kind`` is ``say`` (what matters most), ``note`` (beware) or empty."""
    return Html(f"<p{_class(kind)}>{text(content)}</p>")


def bullets(items: Sequence[str]) -> Html:
    """A list."""
    return Html(f"<ul>{''.join(f'<li>{text(item)}</li>' for item in items)}</ul>") if items else Html("")


def subheading(content: str) -> Html:
    """A heading inside a section."""
    return Html(f"<h3>{text(content)}</h3>")


def cards(items: Sequence[tuple[str, str, Sequence[str]]]) -> Html:
    """Large figures: (name, value, lines below it) each."""
    inner = []
    for name, value, below in items:
        lines = "".join(f'<span class="range">{text(line)}</span>' for line in below)
        inner.append(
            f'<div class="card"><dt>{text(name)}</dt><dd><span class="value">{text(value)}</span>{lines}</dd></div>'
        )
    return Html(f'<dl class="cards">{"".join(inner)}</dl>')


def facts(items: Mapping[str, Cell]) -> Html:
    """Names and values in two columns, one below the other on a phone."""
    rows = "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in items.items())
    return Html(f'<dl class="facts">{rows}</dl>')


def table(
    caption: str,
    header: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    left: Sequence[int] = (0,),
    more: str = "",
    stacked: bool = False,
) -> Html:
    """A table whose first column names the rows; columns not in ``left`` hold numbers.

    On a narrow screen it scrolls by itself, so that the page does not; or, if ``stacked``, each row becomes a few
    lines. (The roles say that it is a table even then.)

    Args:
        caption: what it holds.
        header: names of the columns.
        rows: their cells.
        left: columns of words.
        more: after the caption, what one must know to read it.
        stacked: for rows with long names.
    """

    def css(column: int) -> str:
        return "" if column in left else ' class="number"'

    head = "".join(
        f'<th role="columnheader" scope="col"{css(column)}>{text(name)}</th>'
        for column, name in enumerate(header)
    )
    body = []
    for row in rows:
        cells = "".join(
            f'<td role="cell" data-name="{escape(header[column], quote=True)}"{css(column)}>{text(cell)}</td>'
            for column, cell in enumerate(row)
            if column
        )
        body.append(f'<tr role="row"><th role="rowheader" scope="row">{text(row[0])}</th>{cells}</tr>')
    label = escape(caption, quote=True)
    explained = text(f"{caption}. {more}" if more else f"{caption}.")
    return Html(
        f'<div><p class="caption">{explained}</p>'
        f'<div class="scroll" role="region" aria-label="{label}" tabindex="0">'
        f'<table role="table" aria-label="{label}"{_class("stacked" if stacked else "")}>'
        f'<thead role="rowgroup"><tr role="row">{head}</tr></thead>'
        f'<tbody role="rowgroup">{"".join(body)}</tbody></table></div></div>'
    )


def picture(content: bytes, kind: str, alt: str, caption: str = "") -> Html:
    """A picture inside the page.

    Args:
        content: bytes of the file.
        kind: ``svg+xml``, ``png`` or ``jpeg``.
        alt: what it shows, for those who do not see it.
        caption: below it.
    """
    encoded = base64.b64encode(content).decode()
    below = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    image = f'<img src="data:image/{kind};base64,{encoded}" alt="{escape(alt, quote=True)}">'
    return Html(f"<figure>{image}{below}</figure>")


def drawing(figure: Figure, alt: str, caption: str = "") -> Html:
    """A matplotlib figure as an SVG picture."""
    return picture(figure_svg(figure), "svg+xml", alt, caption)


def figure_svg(figure: Figure) -> bytes:
    """A figure's SVG; the same figure gives the same bytes, and letters are outlines, so no font is needed."""
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "pcam-jax", "svg.fonttype": "path"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def figures(items: Sequence[str], kind: str = "") -> Html:
    """Pictures side by side where there is room; ``kind`` is empty, ``small`` or ``lone`` (one, not too wide)."""
    return Html(f'<div class="{f"figures {kind}".strip()}">{"".join(items)}</div>')


def wide(item: str, label: str) -> Html:
    """A picture too wide for a phone, where it keeps its size and scrolls by itself."""
    name = escape(label, quote=True)
    return Html(f'<div class="scroll wide" role="region" aria-label="{name}" tabindex="0">{item}</div>')


def tiles(items: Sequence[str], panels: int) -> Html:
    """Small pictures of one to three panels each, as many in a row as fit."""
    width = {1: "one", 2: "two"}.get(panels, "three")
    inner = "".join(f"<li>{item}</li>" for item in items)
    return Html(f'<ul class="tiles {width}">{inner}</ul>')


def code(content: str, wrapped: bool = False) -> Html:
    """Text as it is typed; ``wrapped`` breaks long lines between words, never inside an option as browsers would."""
    inner = escape(content)
    if wrapped:
        inner = "\n".join(
            " ".join(f"<span>{word}</span>" for word in line.split(" ")) for line in inner.split("\n")
        )
    return Html(f'<pre{_class("wrapped" if wrapped else "")} tabindex="0">{inner}</pre>')


def details(summary: str, content: str) -> Html:
    """Something to open; in print it is open."""
    return Html(f"<details><summary>{text(summary)}</summary>{content}</details>")


def interval_bar(value: float, low: float, high: float, baseline: float | None) -> Html:
    """A figure between 0 and 1 as a dot on a line with its interval, and a tick where knowing nothing stands.

    It repeats the numbers beside it, so that a screen reader may skip it.
    """
    if math.isnan(value):
        return Html("")
    x = lambda share: 4 + 132 * min(max(share, 0.0), 1.0)  # noqa: E731
    parts = ['<line x1="4" x2="136" y1="9" y2="9" stroke="#b9c2ce" stroke-width="1"/>']
    if baseline is not None and not math.isnan(baseline):
        parts.append(
            f'<line x1="{x(baseline):.1f}" x2="{x(baseline):.1f}" y1="2" y2="16" stroke="#4a5566" '
            'stroke-width="1.5"/>'
        )
    if not math.isnan(low):
        parts.append(
            f'<line x1="{x(low):.1f}" x2="{x(high):.1f}" y1="9" y2="9" stroke="#0b4f8a" stroke-width="9" '
            'stroke-opacity=".35"/>'
        )
    parts.append(f'<circle cx="{x(value):.1f}" cy="9" r="2.6" fill="#0b4f8a"/>')
    return Html(f'<svg viewBox="0 0 140 18" aria-hidden="true">{"".join(parts)}</svg>')


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""
