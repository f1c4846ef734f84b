"""The page's style sheet: one accent, system fonts, light and dark."""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #fbfaf8; --card: #ffffff; --ink: #1d2024; --muted: #5b626c; --line: #e4e1da; --accent: #0b6e69;
  --wash: #eef5f4; --pos: #12897f; --neg: #d9652b;
  --s0: #0b7a73; --s1: #c2500f; --s2: #5a4fcf; --s3: #a3195b; --s4: #54700e; --s5: #2563a8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #121416; --card: #191c1f; --ink: #e9e8e4; --muted: #a0a7b0; --line: #2c3136; --accent: #5cc8bd;
    --wash: #16292a; --pos: #16857c; --neg: #b9541f;
    --s0: #4fc7bb; --s1: #f0945a; --s2: #a9a1ff; --s3: #f283b5; --s4: #b4d15c; --s5: #7db7f0;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1304px; margin: 0 auto; padding: clamp(1.5rem, 5vw, 4rem) clamp(1rem, 4vw, 2.5rem) 4rem; }
h1 { margin: 0 0 1rem; font-size: clamp(1.7rem, 4.2vw, 2.6rem); line-height: 1.12; letter-spacing: -.022em;
  font-weight: 650; }
h2 { margin: 0 0 .35rem; font-size: 1.3rem; line-height: 1.25; letter-spacing: -.012em; font-weight: 620; }
section { margin-top: clamp(2.6rem, 6vw, 4.2rem); }
.lede { max-width: 46rem; margin: 0; font-size: 1.09rem; color: var(--muted); }
.help { max-width: 46rem; margin: 0 0 1.1rem; color: var(--muted); font-size: .94rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 1px; margin: 2rem 0 0;
  padding: 0; background: var(--line); border: 1px solid var(--line); border-radius: 12px; overflow: hidden; }
.facts div { display: flex; flex-direction: column; justify-content: space-between;
  background: var(--card); padding: .95rem 1.1rem 1rem; }
.facts dt { color: var(--muted); font-size: .82rem; line-height: 1.35; }
.facts dd { margin: .15rem 0 0; font-size: 1.5rem; line-height: 1.2; font-weight: 600; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums; }
.facts small { font-size: .8rem; font-weight: 400; color: var(--muted); letter-spacing: 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }

.results { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
.results th, .results td { text-align: left; padding: .62rem 1rem; border-top: 1px solid var(--line);
  vertical-align: top; }
.results thead th { border-top: 0; color: var(--muted); font-size: .82rem; font-weight: 500; padding-top: .85rem; }
.results tbody th { font-weight: 500; }
.results tbody th small, .results td small { display: block; color: var(--muted); font-size: .78rem; font-weight: 400; }
.results td b { font-weight: 560; }
.results .ours { background: var(--wash); }
.results .ours th, .results .ours td b { font-weight: 680; }
.results .first th, .results .first td { border-top-color: color-mix(in srgb, var(--muted) 45%, transparent); }
.results .real th, .results .real td { color: var(--muted); }
.mark { display: block; width: 100%; max-width: 120px; height: 10px; margin: .2rem 0 .1rem; }
.mark .rail { stroke: var(--line); stroke-width: 2; }
.mark .span { stroke: var(--accent); stroke-width: 4; stroke-linecap: round; opacity: .45; }
.mark .target { stroke: var(--muted); stroke-width: 1.5; }
.mark circle { fill: var(--accent); }

.scroll { overflow-x: auto; -webkit-overflow-scrolling: touch; }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.pictures { border-collapse: separate; border-spacing: 0; }
h1, .lede, .help, .results tbody th, .results .words, .pictures th { overflow-wrap: anywhere; }
.results tbody th { min-width: 7rem; }
.pictures th { font-weight: 450; font-size: .82rem; line-height: 1.35; text-align: left; color: var(--muted); }
.pictures thead th { vertical-align: bottom; padding: .8rem .2rem .5rem; color: var(--ink); max-width: 96px; }
.pictures thead small { display: block; color: var(--muted); font-size: .78rem; }
.pictures tbody th { position: sticky; left: 0; z-index: 1; width: 9.4rem; min-width: 9.4rem;
  padding: .2rem .7rem .2rem 1rem; background: var(--card); }
.pictures td { padding: 2px; }
.pictures .apart { padding-left: 12px; }
.pictures thead th:first-child { position: sticky; left: 0; z-index: 1; padding-left: 1rem; background: var(--card);
  color: var(--muted); }
.pictures img { display: block; width: 160px; height: auto; border-radius: 4px; }
.pictures .pixels { width: 96px; image-rendering: pixelated; }
.pictures tr:last-child th, .pictures tr:last-child td { padding-bottom: 14px; }
.pictures td:last-child { padding-right: 14px; }

.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: 1rem; }
.charts .card, .map { padding: 1.1rem 1.2rem .9rem; }
.chart { display: block; width: 100%; height: auto; overflow: hidden; font-family: inherit; }
.map { margin-bottom: 1rem; }
.map .chart { min-width: 640px; max-width: 780px; }
.chart text { fill: var(--ink); font-size: 12.5px; }
.chart .title { font-size: 15px; font-weight: 600; }
.chart .tick, .chart .label, .chart .note { fill: var(--muted); font-variant-numeric: tabular-nums; }
.chart .value { font-size: 12px; font-variant-numeric: tabular-nums; }
.chart .grid { stroke: var(--line); stroke-width: 1; }
.chart .axis { stroke: var(--muted); stroke-width: 1; opacity: .6; }
.chart path { fill: none; }
.chart .line { stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.chart .bar-of { stroke-width: 2; }
.chart .raw { stroke-width: 1; opacity: .28; }
.chart .line.s1 { stroke-dasharray: 7 4; } .chart .line.s2 { stroke-dasharray: 2 4; }
.chart .line.s3 { stroke-dasharray: 10 3 2 3; } .chart .line.s4 { stroke-dasharray: 4 3; }
.chart .line.again { stroke-dasharray: 14 3 1 3 1 3; }
.chart .s0 { stroke: var(--s0); } .chart .s1 { stroke: var(--s1); } .chart .s2 { stroke: var(--s2); }
.chart .s3 { stroke: var(--s3); } .chart .s4 { stroke: var(--s4); } .chart .s5 { stroke: var(--s5); }
.chart .band { stroke: none; opacity: .16; }
.chart .band.s0, .chart .dot.s0 { fill: var(--s0); } .chart .band.s1, .chart .dot.s1 { fill: var(--s1); }
.chart .band.s2, .chart .dot.s2 { fill: var(--s2); } .chart .band.s3, .chart .dot.s3 { fill: var(--s3); }
.chart .band.s4, .chart .dot.s4 { fill: var(--s4); } .chart .band.s5, .chart .dot.s5 { fill: var(--s5); }
.chart .dot { stroke: none; }
.chart .bar { fill: var(--s0); } .chart .pos { fill: var(--pos); } .chart .neg { fill: var(--neg); }
.chart .blank { fill: none; stroke: var(--line); stroke-dasharray: 3 3; }

details { padding: .9rem 1.2rem; }
summary { cursor: pointer; font-weight: 500; }
.settings { margin-top: .8rem; border-collapse: collapse; font-size: .88rem; }
.settings th, .settings td { text-align: left; vertical-align: top; padding: .18rem 1.4rem .18rem 0; font-weight: 400;
  overflow-wrap: anywhere; }
.settings th { color: var(--muted); }
footer { margin-top: 3rem; color: var(--muted); font-size: .86rem; }

@media (max-width: 760px) {
  .results, .results tbody, .results tr, .results th, .results td { display: block; }
  .results thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  .results tr { display: grid; grid-template-columns: 1fr 1fr; gap: .5rem 1rem; padding: .9rem 1rem;
    border-top: 1px solid var(--line); }
  .results tr:first-child { border-top: 0; }
  .results tbody th { grid-column: 1 / -1; font-size: 1.02rem; }
  .results tbody th small { display: inline; margin-left: .4rem; }
  .results th, .results td { padding: 0; border: 0; }
  .results td::before { content: attr(data-label); display: block; color: var(--muted); font-size: .78rem; }
  .pictures tbody th { width: 6.6rem; min-width: 6.6rem; padding: .2rem .5rem .2rem .8rem; font-size: .74rem; }
  .pictures .pixels { width: 72px; }
  .charts .chart text { font-size: 14px; } .charts .chart .title { font-size: 17px; }
  .pictures thead th:first-child { padding-left: .8rem; }
  .pictures thead th { font-size: .75rem; max-width: 72px; }
}
@media print { body { background: #fff; } section { break-inside: avoid; } }
"""
