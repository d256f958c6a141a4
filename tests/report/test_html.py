"""Pieces of a page: nothing that a name holds becomes markup, and the same figure gives the same bytes."""

import numpy as np
import page_checks

from pcam_jax.report import html
from pcam_jax.report.canvas import new_axes

NASTY = "<script>alert(\"x\")</script> & 'quotes' {braces} %s"


def test_no_name_becomes_markup():
    figure, (axes,) = new_axes()
    axes.plot([0, 1])
    pieces = html.join(
        html.paragraph(NASTY, "note"),
        html.bullets([NASTY]),
        html.subheading(NASTY),
        html.cards([(NASTY, NASTY, [NASTY])]),
        html.facts({NASTY: NASTY}),
        html.table(NASTY, [NASTY, NASTY], [[NASTY, NASTY]], more=NASTY),
        html.drawing(figure, NASTY, NASTY),
        html.details(NASTY, html.code(NASTY) + html.code(NASTY, wrapped=True)),
    )
    page = html.page(NASTY, NASTY, NASTY, [("one", NASTY, pieces)])
    page_checks.check_source(page)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") > 20


def test_the_same_figure_gives_the_same_bytes():
    def draw():
        figure, (axes,) = new_axes()
        axes.plot([0, 1], label="line")
        axes.legend()
        return html.figure_svg(figure)

    assert draw() == draw()
    assert b"<text" not in draw()  # outlines, which need no font


def test_interval_bar_stays_inside():
    bar = html.interval_bar(0.9, 0.8, 1.2, 0.5)
    places = [
        float(part.split('"')[0]) for name in ("x1=", "x2=", "cx=") for part in bar.split(f'{name}"')[1:]
    ]
    assert min(places) >= 4
    assert max(places) <= 136
    assert html.interval_bar(np.nan, np.nan, np.nan, None) == ""
    assert 'stroke-width="9"' not in html.interval_bar(0.9, np.nan, np.nan, None)


def test_a_command_breaks_between_words():
    """Browsers break after a hyphen: `--train.seed` would begin a line as `-train.seed`."""
    assert "<span>--train.seed</span> <span>0</span>\n<span>b</span>" in html.code(
        "a --train.seed 0\nb", wrapped=True
    )


def test_tables_name_their_cells_for_narrow_screens():
    table = html.table("Costs", ["run", "minutes"], [["a", 3]], stacked=True)
    assert '<td role="cell" data-name="minutes" class="number">3</td>' in table
    assert 'class="stacked"' in table
