"""The look of every page: readable on a phone, on a desk and in print, without any file but the page itself."""

STYLE = """
:root { color-scheme: light; --ink: #1b2330; --soft: #4a5566; --line: #d4dae3; --paper: #ffffff;
  --wash: #f3f6fa; --accent: #0b4f8a; --warn: #7a3e00; --warn-wash: #fff4e0; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; color: var(--ink); background: var(--paper);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
a { color: var(--accent); }
a:focus-visible, summary:focus-visible, [tabindex]:focus-visible { outline: 3px solid #e69f00; outline-offset: 2px; }
.skip { position: absolute; left: -100rem; }
.skip:focus { left: 1rem; top: 1rem; background: #fff; padding: .5rem; }
header, main, footer { max-width: 64rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 1.5rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: .2rem 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.35rem; line-height: 1.25; margin: 2.6rem 0 .8rem; padding-top: .8rem;
  border-top: 2px solid var(--line); }
h3 { font-size: 1.08rem; margin: 1.8rem 0 .6rem; }
p, ul, ol { max-width: 46rem; overflow-wrap: anywhere; }
.lead { color: var(--soft); margin: 0 0 .8rem; }
.use { border: 2px solid var(--warn); background: var(--warn-wash); color: var(--warn); font-weight: 600;
  padding: .5rem .9rem; border-radius: .4rem; display: inline-block; margin: .3rem 0; }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; padding: 0; margin: .9rem 0 0;
  max-width: none; }
nav a { display: inline-block; padding: .2rem 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.8rem, 1fr)); gap: .8rem; margin: 1rem 0;
  padding: 0; }
.card { border: 1px solid var(--line); background: var(--wash); border-radius: .5rem; padding: .7rem .9rem; }
.card dt, .card .range { color: var(--soft); font-size: .92rem; }
.card dd { margin: 0; }
.card .value { font-size: 1.9rem; font-weight: 650; line-height: 1.2; font-variant-numeric: tabular-nums; }
.card .range { display: block; line-height: 1.35; }
.say, .note { padding: .6rem .9rem; margin: 1rem 0; max-width: 46rem; border-left: .35rem solid; }
.say { border-color: var(--accent); background: var(--wash); }
.note { border-color: #b36b00; background: var(--warn-wash); margin: .7rem 0; }
.caption { color: var(--soft); font-size: .95rem; margin: 1rem 0 .2rem; }
.scroll { overflow-x: auto; max-width: 100%; margin: .2rem 0 1rem; }
table { border-collapse: collapse; font-size: .95rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .32rem .9rem .32rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
thead th { border-bottom: 2px solid var(--soft); font-weight: 600; }
tbody th { font-weight: 500; }
.number { text-align: right; white-space: nowrap; }
td small, th small { display: block; color: var(--soft); font-weight: 400; max-width: 26rem; }
.bar svg { display: block; width: 9rem; height: 1.2rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr));
  gap: 1rem 1.5rem; align-items: start; }
.figures.small { grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); }
figure { margin: .4rem 0 1rem; break-inside: avoid; }
figure img { display: block; max-width: 100%; height: auto; }
.figures figure img { width: 100%; }
.figures.lone { max-width: 30rem; }
figcaption { color: var(--soft); font-size: .92rem; max-width: 46rem; margin-top: .25rem; }
.tiles { display: grid; gap: 1.1rem 1.3rem; margin: .8rem 0 1.4rem; padding: 0; list-style: none; max-width: none; }
.tiles.one { grid-template-columns: repeat(auto-fill, minmax(min(100%, 8rem), 1fr)); }
.tiles.two { grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); }
.tiles.three { grid-template-columns: repeat(auto-fill, minmax(min(100%, 25rem), 1fr)); }
.tiles li { break-inside: avoid; }
.tiles figure { margin: 0; }
.tiles img { width: 100%; }
.tiles figcaption { font-size: .88rem; line-height: 1.4; overflow-wrap: anywhere; }
dl.facts { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; gap: .25rem 1.2rem; margin: .6rem 0; }
dl.facts dt { color: var(--soft); }
dl.facts dd { margin: 0; overflow-wrap: anywhere; }
pre { background: var(--wash); border: 1px solid var(--line); border-radius: .4rem; padding: .8rem;
  overflow-x: auto; font: .85rem/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre.wrapped { white-space: pre-wrap; overflow-wrap: anywhere; }
pre.wrapped span { display: inline-block; max-width: 100%; }
code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .92em; }
summary { cursor: pointer; color: var(--accent); }
footer { margin-top: 3rem; padding-bottom: 2rem; color: var(--soft); font-size: .92rem; }
@media (max-width: 34rem) {
  h1 { font-size: 1.4rem; }
  h2 { font-size: 1.2rem; }
  dl.facts { grid-template-columns: 1fr; gap: 0; }
  dl.facts dd { margin-bottom: .45rem; }
  .wide figure { width: 60rem; }
  .stacked, .stacked tbody { display: block; }
  .stacked thead, .stacked .bar { display: none; }
  .stacked tr { display: block; border-bottom: 1px solid var(--line); padding: .4rem 0; }
  .stacked th { display: block; border: 0; padding: 0; }
  .stacked td { display: inline-block; border: 0; padding: 0 .9rem 0 0; }
  .stacked td[data-name]:not(:empty)::before { content: attr(data-name) " "; color: var(--soft); }
}
@page { margin: 16mm 14mm; }
@media print {
  body { font-size: 10pt; }
  header, main, footer { max-width: none; padding: 0; }
  nav, .skip { display: none; }
  a { color: inherit; text-decoration: none; }
  h2, h3, .caption { break-after: avoid; }
  h2 { margin-top: 1.6rem; }
  .cards { grid-template-columns: repeat(4, 1fr); }
  .card .value { font-size: 1.5rem; }
  .figures { grid-template-columns: 1fr 1fr; }
  .figures.small { grid-template-columns: 1fr 1fr 1fr; }
  .figures.lone { max-width: 22rem; grid-template-columns: 1fr; }
  .tiles.one { grid-template-columns: repeat(6, 1fr); }
  .tiles.two { grid-template-columns: repeat(3, 1fr); }
  .tiles.three { grid-template-columns: repeat(2, 1fr); }
  .scroll { overflow: visible; }
  tr, .card, .say, .note { break-inside: avoid; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 0; padding: 0; background: none; font-size: 8pt; }
  details pre { columns: 3; }
  details::details-content { content-visibility: visible; }
  details > summary { display: none; }
  .card, .say, .note, .use, .bar svg { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
