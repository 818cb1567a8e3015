"""`python -m benchmarks.dashboard`: the picture of the dashboard in docs/, its panels' own queries over a real run.

An installation under load, while an agent is killed and a proxy replaced, and some callers are refused. Prometheus
evaluates the queries; they are drawn as plain SVG, since no registry has a Grafana to do it.
"""

import argparse
import asyncio
import contextlib
import re
import tempfile
import time
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import httpx

from benchmarks.chart import STYLE
from tests.support.agent import free_port
from tests.support.installation import Installation, installed
from tests.support.load import steady_load
from tests.support.prometheus import Prometheus, filled, panels, running_prometheus

ROOT = Path(__file__).resolve().parents[1]
WINDOW = "6s"
"""What a rate is taken over; Prometheus asks each second."""
CELL, HEAD, WIDTH, HEIGHT, PAD = 45, 34, 355, 168, 14
COLOURS = ("#0a5bd3", "#d1741f", "#2e8b57", "#b23a48", "#7b5ea7", "#8a6d3b", "#1f9aa8", "#6e7781", "#c2559d", "#5a7d2b")
MOST_SERIES = 10

type Series = dict[str, list[tuple[float, float]]]


async def trouble(installation: Installation, seconds: float) -> None:
    """Load it for so long; after a third an agent dies, after two a proxy is replaced, and some callers are refused."""
    token = installation.principals.token("load")
    fields = {"Authorization": f"Bearer {token}"}

    async def err(client: httpx.AsyncClient) -> None:
        while True:
            await client.post(f"{installation.url}/agent/invoke", json={"text": "hi"})
            await client.post(f"{installation.url}/agent/invoke", json={"text": 5}, headers=fields)
            with contextlib.suppress(httpx.HTTPError):
                await client.post(f"{installation.url}/agent/stream", json={"text": "[fail 2]"}, headers=fields)
            await asyncio.sleep(0.7)

    async with (
        httpx.AsyncClient(trust_env=False, timeout=20) as client,
        steady_load(installation.url, token, streams=40, invoke_every=0.3, words=12, pace_ms=250),
    ):
        erring = asyncio.create_task(err(client))
        await asyncio.sleep(seconds / 3)
        victim = next(iter(installation.agents))
        installation.agents.pop(victim).process.kill()
        await asyncio.to_thread(installation.start_agent, victim)
        await asyncio.sleep(seconds / 3)
        await installation.replace_proxy(next(iter(installation.proxies)))
        await asyncio.sleep(seconds / 3)
        erring.cancel()
        await asyncio.gather(erring, return_exceptions=True)


def series_of(panel: dict[str, Any], prometheus: Prometheus, span: tuple[float, float]) -> Series:
    """Give a panel's lines by their legends, each as points of times and values; `span` is from when to when."""
    lines: Series = {}
    start, end = (f"{at:.0f}" for at in span)
    for target in panel["targets"]:
        query = filled(target["expr"], interval=WINDOW)
        for series in prometheus.ask("query_range", query=query, start=start, end=end, step="1")["result"]:
            points = [(float(at), float(value)) for at, value in series["values"] if value != "NaN"]
            lines.setdefault(_legend(target["legendFormat"], series["metric"]), []).extend(points)
    lines = {name: points for name, points in lines.items() if points}
    busiest = sorted(lines, key=lambda name: -max(value for _, value in lines[name]))[:MOST_SERIES]
    return {name: lines[name] for name in lines if name in busiest}


def _legend(text: str, labels: dict[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda found: labels.get(found[1], ""), text)


def draw(prometheus: Prometheus, span: tuple[float, float]) -> str:
    """Draw every panel where the dashboard has it."""
    parts: list[str] = []
    top = 10
    for panel in panels():
        if panel["type"] == "row":
            parts.append(f'<text class="title" x="{PAD}" y="{top + 18}">{escape(panel["title"])}</text>')
            top += HEAD
            continue
        left = PAD + panel["gridPos"]["x"] * CELL
        parts += _panel(panel, series_of(panel, prometheus, span), left, top)
        if panel["gridPos"]["x"] + panel["gridPos"]["w"] >= 24:
            top += HEIGHT + 16
    width = 2 * PAD + 24 * CELL
    size = f'viewBox="0 0 {width} {top}" width="{width}" height="{top}"'
    head = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">', "<title>The dashboard</title>"]
    style = f"<style>{STYLE} path {{ fill: none; stroke-width: 1.5 }} .small {{ font-size: 9px }}</style>"
    return "\n".join([*head, style, *parts, "</svg>"]) + "\n"


def _panel(panel: dict[str, Any], lines: Series, left: float, top: float) -> Iterator[str]:
    bottom, right = top + HEIGHT - 34, left + WIDTH - 8
    inner_top, inner_left = top + 26, left + 44
    points = [point for line in lines.values() for point in line] or [(0.0, 0.0)]
    most = max((value for _, value in points), default=0.0) or 1.0
    first, last = min(at for at, _ in points), max(at for at, _ in points)

    def place(at: float, value: float) -> str:
        x = inner_left + (right - inner_left) * (at - first) / ((last - first) or 1)
        return f"{x:.0f} {bottom - (bottom - inner_top) * value / most:.1f}"

    yield f'<text class="head" x="{left}" y="{top + 14}">{escape(panel["title"])}</text>'
    for part in (0.0, 0.5, 1.0):
        y = bottom - (bottom - inner_top) * part
        yield f'<line class="grid" x1="{inner_left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        value = _value(most * part, panel["fieldConfig"]["defaults"].get("unit", "short"))
        yield f'<text class="small" x="{inner_left - 5}" y="{y + 3:.1f}" text-anchor="end">{value}</text>'
    x = inner_left
    for number, (name, line) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        known = {at for at, _ in line}
        path = "".join(("L" if at - 1 in known else "M") + place(at, value) for at, value in line)
        yield f'<path stroke="{colour}" d="{path}"/>'
        if x < right - 4.6 * len(name):
            yield f'<text class="small" style="fill: {colour}" x="{x:.0f}" y="{bottom + 14}">{escape(name)}</text>'
            x += 4.6 * len(name) + 12


def _value(value: float, unit: str) -> str:
    if unit in ("bytes", "Bps") and value >= 1024:
        return f"{value / 1048576:.1f} MiB" if value >= 1048576 else f"{value / 1024:.0f} KiB"
    if unit == "percentunit":
        return f"{100 * value:.0f} %"
    if unit == "s":
        return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.1f} s"
    return f"{value:.0f}" if value >= 10 or value == 0 else f"{value:.2g}"


def main() -> None:
    """Run it once."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dashboard")
    parser.add_argument("--seconds", type=float, default=45)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "dashboard.svg")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="dashboard-") as directory,
        installed(Path(directory), agents=3, proxies=2, PROXY_RATE_LIMIT="100000/minute") as installation,
        running_prometheus(Path(directory), installation.metrics, address=("127.0.0.1", free_port())) as prometheus,
    ):
        began = time.time()
        asyncio.run(trouble(installation, options.seconds))
        options.out.write_text(draw(prometheus, (began, time.time())))
    print(options.out)


if __name__ == "__main__":
    main()
