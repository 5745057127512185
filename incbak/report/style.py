"""The style sheet of the report. No colour says what no text says."""

STYLE = """
:root {
  --paper: #f6f6f4; --card: #ffffff; --ink: #1b1b1a; --quiet: #62615c; --edge: #deddd8; --none: #ebeae6;
  --read: #1f66b8; --stored: #b94f08; --area: #f3dccb;
  --incremental: #93bdec; --full: #1f66b8; --fallback: #e2a400; --incomplete: #c22f2f; --mark: #1b1b1a;
  --q1: #cfe1f7; --q2: #98c1ee; --q3: #5b97dd; --q4: #2667b5; --q5: #0f3f7c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #141413; --card: #1e1e1c; --ink: #ecebe6; --quiet: #a3a199; --edge: #383733; --none: #2b2b28;
    --read: #6faef6; --stored: #f0954c; --area: #4a3120;
    --incremental: #2f5f97; --full: #6faef6; --fallback: #e0b13c; --incomplete: #f07070; --mark: #141413;
    --q1: #1d3a5e; --q2: #285488; --q3: #3e7cc2; --q4: #6faef6; --q5: #b9d8ff;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.45 system-ui, sans-serif; }
header, main { max-width: 1120px; margin: 0 auto; padding: 0 16px; }
header { padding-top: 20px; }
main { padding-bottom: 40px; }
h1 { font-size: 1.35rem; margin: 0; }
h2 { font-size: 1.15rem; margin: 36px 0 4px; padding-top: 16px; border-top: 1px solid var(--edge); }
h3 { font-size: .95rem; margin: 0 0 8px; }
h1, h2, h3, header p { overflow-wrap: anywhere; }
p { margin: 4px 0 10px; }
.quiet { color: var(--quiet); font-size: .85rem; }
.alarm { border-left: 4px solid var(--incomplete); padding: 8px 12px; background: var(--card); }
.tiles { display: flex; flex-wrap: wrap; gap: 8px 28px; margin: 16px 0; }
.tiles div { display: flex; flex-direction: column; }
.tiles b { font-size: 1.3rem; font-weight: 600; }
.tiles span { color: var(--quiet); font-size: .85rem; }
.cards { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); }
.card { background: var(--card); border: 1px solid var(--edge); border-radius: 8px; padding: 12px; min-width: 0; }
.card > :last-child { margin-bottom: 0; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--quiet); font: 10px system-ui, sans-serif; }
svg .end { text-anchor: end; }
svg.key { display: inline-block; width: 66px; height: 11px; vertical-align: -1px; margin: 0 4px; }
.grid { stroke: var(--edge); stroke-width: 1; }
.series { fill: none; stroke-width: 1.5; stroke-linejoin: round; }
.series.read { stroke: var(--read); } .series.stored { stroke: var(--stored); }
.dot.read { fill: var(--read); } .dot.stored { fill: var(--stored); }
.area { fill: var(--area); stroke: none; }
.day.none, .q0 { fill: var(--none); }
.day.incremental { fill: var(--incremental); } .day.full { fill: var(--full); }
.day.fallback { fill: var(--fallback); } .day.incomplete { fill: var(--incomplete); } .mark { fill: var(--mark); }
.q1 { fill: var(--q1); } .q2 { fill: var(--q2); } .q3 { fill: var(--q3); }
.q4 { fill: var(--q4); } .q5 { fill: var(--q5); }
.keys { display: flex; flex-wrap: wrap; align-items: center; gap: 2px 12px; font-size: .85rem; margin: 8px 0; }
.swatch { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 5px; }
.swatch.read { background: var(--read); } .swatch.stored { background: var(--stored); }
.swatch.incremental { background: var(--incremental); } .swatch.full { background: var(--full); }
.swatch.fallback { background: var(--fallback); } .swatch.incomplete { background: var(--incomplete); }
details { margin-top: 12px; }
summary { cursor: pointer; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; margin-top: 8px; min-width: 100%; }
th, td { text-align: left; padding: 4px 12px 4px 0; border-bottom: 1px solid var(--edge); vertical-align: top; }
td:not(:last-child) { white-space: nowrap; }
td:last-child { min-width: 18em; overflow-wrap: anywhere; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
"""
