"""Turns results into a table for the terminal, Markdown for the documentation, and JSON.

Prints nothing itself.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.chart import draw_chart
from benchmarks.figures import FIGURES, OPEN_FIGURES, Figure, Result, open_key
from benchmarks.machine import Machine


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that one run of the benchmark found."""

    machine: Machine
    rounds: int
    results: Sequence[Result]
    opens: Sequence[int]

    def present(self) -> list[Result]:
        """Give those that were measured."""
        return [result for result in self.results if not result.absent]

    def absent(self) -> list[Result]:
        """Give those that were not."""
        return [result for result in self.results if result.absent]


TABLES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "Invoke",
        (
            *("invoke_cpu_us", "invoke_cpu_us_1", "invoke_instructions_k", "invoke_rate", "added_p50_us_1"),
            *("added_p99_us_1", "added_p50_us_16", "added_p99_us_16", "errors"),
        ),
    ),
    (
        "Stream",
        (
            *("event_cpu_us", "event_instructions_k", "event_added_p50_us", "event_added_p99_us"),
            *("first_byte_us", "burst_cpu_us", "burst_instructions_k"),
        ),
    ),
    (
        "Refusals",
        ("refuse_401_cpu_us", "refuse_401_instructions_k", "refuse_429_cpu_us", "refuse_429_instructions_k"),
    ),
)


def format_cell(result: Result, key: str, digits: int) -> str:
    """Write `median (least to most)`, or a dash."""
    spread = result.spread(key)
    if spread is None:
        return "-"
    middle, least, most = (f"{value:,.{digits}f}" for value in (spread.median, spread.least, spread.most))
    return middle if least == most else f"{middle} ({least} to {most})"


def _rows(report: Report, columns: Sequence[tuple[str, Figure]]) -> list[list[str]]:
    """Give the header and a row per measured contender, without columns and rows that nobody has."""
    kept = [(key, figure) for key, figure in columns if any(result.spread(key) for result in report.present())]
    header = ["", *(f"{figure.title} [{figure.unit}]" if figure.unit else figure.title for _, figure in kept)]
    rows = [
        [result.title, *(format_cell(result, key, figure.digits) for key, figure in kept)]
        for result in report.present()
        if any(result.spread(key) for key, _ in kept)
    ]
    return [header, *rows] if kept else []


def make_tables(report: Report) -> list[tuple[str, list[list[str]]]]:
    """Give every table as its title and its rows, header first."""
    by_key = {figure.key: figure for figure in FIGURES}
    tables = [(title, _rows(report, [(key, by_key[key]) for key in keys])) for title, keys in TABLES]
    for count in report.opens:
        columns = [(open_key(count, figure), figure) for figure in OPEN_FIGURES]
        tables.append((f"{count:,} open streams, one event a second each", _rows(report, columns)))
    return [(title, rows) for title, rows in tables if rows]


def write_markdown(report: Report) -> str:
    """Write the report for the documentation."""
    lines = [
        f"Measured on {report.machine.sentence()}; {report.rounds} interleaved rounds, median (least to most).",
        "",
    ]
    for title, rows in make_tables(report):
        lines += [f"**{title}**", "", "| " + " | ".join(rows[0]) + " |", "|---" + "|---:" * (len(rows[0]) - 1) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows[1:]]
        lines.append("")
    lines += ["| contender | how it does the job | version |", "|---|---|---|"]
    lines += [f"| {result.title} | {result.job} | {result.version} |" for result in report.present()]
    lines += [f"| {result.title} | absent: {result.absent} | - |" for result in report.absent()]
    return "\n".join(lines) + "\n"


def write_text(report: Report) -> str:
    """Write the report for a terminal: medians only, one line per contender."""
    lines = [report.machine.sentence(), f"{report.rounds} interleaved rounds, median (least to most)"]
    for title, rows in make_tables(report):
        lines += ["", title.upper()]
        for column, name in enumerate(rows[0][1:], start=1):
            lines.append(f"  {name}")
            width = max(len(row[0]) for row in rows)
            lines += [f"    {row[0]:<{width}}  {row[column]:>24}" for row in rows[1:] if row[column] != "-"]
    lines += ["", *(f"absent: {result.title}: {result.absent}" for result in report.absent())]
    return "\n".join(lines)


def write_json(report: Report) -> str:
    """Write everything, for other programs."""
    plain = {
        "machine": report.machine.as_dict(),
        "rounds": report.rounds,
        "contenders": [result.as_dict() for result in report.results],
    }
    return json.dumps(plain, indent=2, ensure_ascii=False) + "\n"


def write_all(report: Report, directory: Path) -> str:
    """Write results.json, results.md, results.txt and results.svg; give the text."""
    directory.mkdir(parents=True, exist_ok=True)
    text = write_text(report)
    (directory / "results.json").write_text(write_json(report), encoding="utf-8")
    (directory / "results.md").write_text(write_markdown(report), encoding="utf-8")
    (directory / "results.txt").write_text(text + "\n", encoding="utf-8")
    (directory / "results.svg").write_text(draw_chart(report.present(), report.machine.sentence()), encoding="utf-8")
    return text
