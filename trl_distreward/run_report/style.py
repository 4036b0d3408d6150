# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""The style sheet of the page: light, dark, narrow and on paper."""

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --faint: #5b6570; --paper: #ffffff; --rule: #d8dde3; --wash: #f4f6f8;
  --c0: #0b62b8; --c1: #c2410c; --c2: #15803d; --c3: #7c3aed; --c4: #a16207; --c5: #be185d; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e7eb; --faint: #9aa5b1; --paper: #14171a; --rule: #343a41; --wash: #1d2125;
    --c0: #6cb2f5; --c1: #fb923c; --c2: #5fd38a; --c3: #b79cfb; --c4: #e3b341; --c5: #f58ab9; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .8rem; padding-bottom: .3rem; border-bottom: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p { margin: .5rem 0; max-width: 72ch; }
.faint, .note { color: var(--faint); }
.note { font-size: .84rem; margin: .2rem 0 0; }
.status { border-left: 4px solid var(--c1); padding: .2rem .8rem; background: var(--wash); }
a { color: var(--c0); }
nav { font-size: .9rem; margin: .8rem 0; display: flex; flex-wrap: wrap; gap: .2rem 1rem; }
dl.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(46%, 210px), 1fr)); gap: .8rem 1.2rem;
  margin: 1.2rem 0; }
dl.facts div { border-top: 2px solid var(--rule); padding-top: .35rem; }
dt { color: var(--faint); font-size: .84rem; }
dd { margin: 0; font-size: 1.05rem; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); gap: 1.4rem 1.6rem;
  margin: 1rem 0; }
figure { margin: 0; min-width: 0; break-inside: avoid; }
figure.chart { max-width: 520px; }
figcaption { font-weight: 600; font-size: .95rem; margin-bottom: .15rem; overflow-wrap: anywhere; }
figure svg { display: block; width: 100%; height: auto; }
svg text { font: 12px system-ui, sans-serif; fill: var(--ink); }
svg text.faint { fill: var(--faint); }
svg .end { text-anchor: end; } svg .middle { text-anchor: middle; }
svg .grid { stroke: var(--rule); stroke-width: 1; fill: none; }
svg .zero { stroke: var(--ink); stroke-width: 1; fill: none; }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .band { opacity: .18; }
svg .bar { fill: var(--c0); }
.s0 { stroke: var(--c0); } .s1 { stroke: var(--c1); stroke-dasharray: 7 3; } .s2 { stroke: var(--c2);
  stroke-dasharray: 2 3; } .s3 { stroke: var(--c3); stroke-dasharray: 9 3 2 3; } .s4 { stroke: var(--c4);
  stroke-dasharray: 12 4; } .s5 { stroke: var(--c5); stroke-dasharray: 4 4; }
.f0, .p0 { fill: var(--c0); } .f1, .p1 { fill: var(--c1); } .f2, .p2 { fill: var(--c2); } .f3, .p3 { fill: var(--c3); }
.f4, .p4 { fill: var(--c4); } .f5, .p5 { fill: var(--c5); } .p6 { fill: var(--faint); } .p7 { fill: var(--rule); }
ul.legend { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: 0 1rem; font-size: .84rem; }
ul.legend li { overflow-wrap: anywhere; }
figure svg.key { display: inline-block; width: 24px; height: 8px; margin-right: .4rem; vertical-align: middle; }
svg.shares { width: 100%; height: 1.6rem; display: block; margin: .6rem 0; }
svg.swatch { width: .8rem; height: .8rem; margin-right: .5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; margin: .6rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
thead th { color: var(--faint); font-weight: 600; font-size: .84rem; }
tbody th { font-weight: 500; }
.num { text-align: right; white-space: nowrap; }
.better { color: var(--c2); } .worse { color: var(--c1); }
code { font: .88em ui-monospace, "Cascadia Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 1.2rem; }
img { width: 100%; height: auto; display: block; border: 1px solid var(--rule); }
img.pixels { image-rendering: pixelated; }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--faint); }
footer { margin-top: 3rem; color: var(--faint); font-size: .84rem; }
@media print {
  :root { --ink: #000; --faint: #444; --paper: #fff; --rule: #bbb; --wash: #f4f4f4; --c0: #0b62b8; --c1: #c2410c;
    --c2: #15803d; --c3: #7c3aed; --c4: #a16207; --c5: #be185d; }
  body { max-width: none; padding: 0; font-size: 11pt; } nav { display: none; } h2 { break-after: avoid; }
  svg, img { print-color-adjust: exact; } tr { break-inside: avoid; } .scroll { overflow: visible; } }
""".strip()
