"""Draws the picture for the README: CPU per invoke and per event, a dot for the median, a line for the spread.

Plain SVG on a transparent ground, for light and dark pages; a logarithmic axis, as contenders differ 1000-fold.
"""

import math
from collections.abc import Sequence
from html import escape

from benchmarks.figures import Result, Spread

WIDTH = 860
LABEL = 230
PANEL = 270
GAP = 40
ROW = 26
TOP = 84
PANELS = (("invoke_cpu_us", "CPU per invoke, 16 in flight"), ("event_cpu_us", "CPU per streamed event"))
STYLE = """
  text { font-family: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; font-size: 13px; fill: #57606a }
  .title { font-size: 16px; font-weight: 600; fill: #24292f }
  .head { font-weight: 600; fill: #24292f }
  .small { font-size: 11px }
  .ours { font-weight: 700; fill: #0a5bd3 }
  .grid { stroke: #8b949e; stroke-opacity: .25 }
  .range { stroke: #8b949e; stroke-width: 3; stroke-linecap: round; stroke-opacity: .6 }
  .dot { fill: #6e7781 }
  .range.ours { stroke: #0a5bd3 } .dot.ours { fill: #0a5bd3 }
  @media (prefers-color-scheme: dark) {
    text { fill: #9aa4af } .title, .head { fill: #e6edf3 } .dot { fill: #9aa4af }
    .ours { fill: #6cb0ff } .range.ours { stroke: #6cb0ff } .dot.ours { fill: #6cb0ff }
  }
"""


def format_value(value: float) -> str:
    """Write microseconds shortly: 12.3 µs, 430 µs, 1.3 ms, 36 ms."""
    if value >= 1000:
        return f"{value / 1000:,.{0 if value >= 10_000 else 1}f} ms"
    return f"{value:,.0f} µs" if value >= 100 else f"{value:.1f} µs"


def _bounds(spreads: Sequence[Spread]) -> tuple[int, int]:
    least = min(max(0.1, spread.least) for spread in spreads)
    most = max(spread.most for spread in spreads)
    low = math.floor(math.log10(least))
    return low, max(low + 1, math.ceil(math.log10(most)))


def _panel(results: Sequence[Result], key: str, title: str, left: int) -> list[str]:
    spreads = {result.key: spread for result in results if (spread := result.spread(key)) is not None}
    if not spreads:
        return []
    low, high = _bounds(list(spreads.values()))
    plot = PANEL - 60
    bottom = TOP + ROW * len(results)

    def place(value: float) -> float:
        return left + plot * (math.log10(max(value, 10.0**low)) - low) / (high - low)

    lines = [f'<text class="head" x="{left}" y="{TOP - 32}">{escape(title)}</text>']
    for power in range(low, high + 1):
        x = place(10.0**power)
        lines.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 8}" y2="{bottom - 6}"/>')
        name = format_value(10.0**power).replace(".0", "")
        lines.append(f'<text class="small" x="{x:.1f}" y="{TOP - 14}" text-anchor="middle">{name}</text>')
    for row, result in enumerate(results):
        spread = spreads.get(result.key)
        if spread is None:
            continue
        y = TOP + ROW * row + 8
        kind = " ours" if result.ours else ""
        x = place(spread.median)
        ends = f'x1="{place(spread.least):.1f}" x2="{place(spread.most):.1f}" y1="{y}" y2="{y}"'
        lines.append(f'<line class="range{kind}" {ends}/>')
        lines.append(f'<circle class="dot{kind}" cx="{x:.1f}" cy="{y}" r="5"/>')
        beside = max(x, place(spread.most)) + 10
        lines.append(f'<text class="small{kind}" x="{beside:.1f}" y="{y + 4}">{format_value(spread.median)}</text>')
    return lines


def draw_chart(results: Sequence[Result], caption: str) -> str:
    """Draw both panels, cheapest invoke first; `caption` says on what it was measured."""
    shown = [result for result in results if result.spread(PANELS[0][0]) is not None]
    shown.sort(key=lambda result: spread.median if (spread := result.spread(PANELS[0][0])) else math.inf)
    height = TOP + ROW * len(shown) + 34
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
        "<title>CPU per invoke and per streamed event, by proxy</title>",
        f"<style>{STYLE}</style>",
        '<text class="title" x="12" y="26">What a request costs: one worker on one core</text>',
    ]
    for row, result in enumerate(shown):
        kind = ' class="ours"' if result.ours else ""
        y = TOP + ROW * row + 12
        lines.append(f'<text{kind} x="{LABEL - 14}" y="{y}" text-anchor="end">{escape(result.title)}</text>')
    for number, (key, title) in enumerate(PANELS):
        lines += _panel(shown, key, title, LABEL + number * (PANEL + GAP))
    note = f"Median and range, logarithmic. {caption}"
    lines += [f'<text class="small" x="12" y="{height - 10}">{escape(note)}</text>', "</svg>"]
    return "\n".join(lines) + "\n"
