"""What must hold for every page: nothing fetched, readable at every width, named for screen readers."""

from __future__ import annotations

import itertools
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import browser as chromium
import pytest

# one expression that measures the page as it is laid out
_MEASURE = """(() => {
  const seen = element => element.getClientRects().length > 0 && getComputedStyle(element).visibility !== 'hidden';
  const channel = value => (value /= 255) <= .04045 ? value / 12.92 : ((value + .055) / 1.055) ** 2.4;
  const luminance = color => { const [r, g, b] = color.match(/[\\d.]+/g).map(Number);
    return .2126 * channel(r) + .7152 * channel(g) + .0722 * channel(b); };
  const behind = element => { for (let e = element; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor;
      if (color !== 'rgba(0, 0, 0, 0)' && color !== 'transparent') return color; } return 'rgb(255, 255, 255)'; };
  const faint = [];
  for (const element of document.querySelectorAll('body *')) {
    const own = [...element.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || !seen(element)) continue;
    const style = getComputedStyle(element);
    const [a, b] = [luminance(style.color), luminance(behind(element))].sort((x, y) => y - x);
    const large = parseFloat(style.fontSize) >= 24;
    if ((a + .05) / (b + .05) < (large ? 3 : 4.5)) faint.push(element.textContent.trim().slice(0, 40));
  }
  const tooSmall = [...document.querySelectorAll('body *')].filter(e => seen(e) && e.childElementCount === 0
    && e.textContent.trim() && !e.closest('svg') && parseFloat(getComputedStyle(e).fontSize) < 11)
    .map(e => e.textContent.trim().slice(0, 40));
  const wide = [...document.querySelectorAll('body *')].filter(e => seen(e) && !e.closest('.scroll, pre, .skip')
    && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + ' ' + e.className);
  return {
    overflow: document.documentElement.scrollWidth - innerWidth, wide, faint, tooSmall,
    broken: [...document.images].filter(i => !i.complete || !i.naturalWidth).length,
    speechless: [...document.images].filter(i => !(i.alt || '').trim()).length,
    headings: [...document.querySelectorAll('h1, h2, h3')].map(h => +h.tagName[1]),
    lang: document.documentElement.lang, title: document.title,
    links: [...document.querySelectorAll('a[href^="#"]')].filter(a => !document.querySelector(a.hash)).length,
    unnamed: [...document.querySelectorAll('[role=region], nav, section, table')]
      .filter(e => !e.getAttribute('aria-label') && !e.getAttribute('aria-labelledby')).length,
    images: document.images.length, tables: document.querySelectorAll('table').length,
    text: document.body.innerText,
  };
})()"""


class _Outside(HTMLParser):
    """Collects what a page would fetch, run or post, and repeated ids."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in ("script", "iframe", "object", "embed", "form", "base"):
            self.found.append(tag)
        for name in ("src", "href", "srcset", "action", "data"):
            value = values.get(name)
            if value and not value.startswith(("data:", "#")):
                self.found.append(f"{tag} {name}={value}")
        self.found += [f"{tag} {name}" for name, _ in attrs if name.startswith("on")]
        if values.get("id"):
            self.ids.append(str(values["id"]))


def check_source(page: str) -> None:
    """The page's own text asks for nothing outside, runs nothing, and repeats no id."""
    parser = _Outside()
    parser.feed(page)
    assert parser.found == []
    assert len(parser.ids) == len(set(parser.ids))
    assert "url(" not in page
    assert "@import" not in page


def look_at(path: Path, widths: tuple[int, ...] = (1200, 360)) -> dict[str, Any]:
    """Open a page in Chromium, check it at every width and in print, and return what was measured at the first."""
    if chromium.executable() is None:
        pytest.skip("no chromium here; apt-get install chromium")
    check_source(path.read_text(encoding="utf-8"))
    with chromium.Browser() as browser:
        page = browser.open(path, widths[0])
        first: dict[str, Any] | None = None
        for width in widths:
            page.resize(width, 900, mobile=width < 600)
            measured = page.evaluate(_MEASURE)
            told = json.dumps({key: value for key, value in measured.items() if key != "text"})
            for name in ("wide", "faint", "tooSmall"):
                assert measured[name] == [], told
            for name in ("broken", "speechless", "links", "unnamed"):
                assert measured[name] == 0, told
            assert measured["overflow"] <= 0, told
            assert measured["lang"] == "en"
            assert measured["title"]
            levels = measured["headings"]
            assert levels[0] == 1
            assert levels.count(1) == 1
            assert all(later <= level + 1 for level, later in itertools.pairwise(levels)), told
            first = first or measured
        page.resize(1200)
        page.emulate("print")
        hidden = (
            "[...document.querySelectorAll('details pre')].filter(e => !e.getClientRects().length).length"
        )
        assert page.evaluate(hidden) == 0  # what is folded on screen is open on paper
        assert page.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
        assert page.pdf().startswith(b"%PDF")
        asked = [url for url in page.requests() if not url.startswith("data:")]
        assert asked == [path.resolve().as_uri()]
        assert page.complaints() == []
    assert first is not None
    return first
