"""Evaluates the queries of the Grafana dashboard on what proxies were scraped for: as much of PromQL as they use.

Instant selectors, rate, increase, sum, min, max, topk and histogram_quantile; anything else is an error, never a guess.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "agentflow-proxy.json"
_CALL = re.compile(r"(sum|min|max|topk|rate|increase|histogram_quantile)\s*(?:by\s*\(([^)]*)\)\s*)?\((.*)\)", re.DOTALL)
_SELECTOR = re.compile(r"([a-z_:]+)(?:\{([^}]*)\})?(?:\[[^\]]*\])?")
_MATCHER = re.compile(r'(\w+)\s*(=~|!~|=|!=)\s*"([^"]*)"')
_VARIABLES = {"$instance": ".*", "$__rate_interval": "1m"}

type Labels = frozenset[tuple[str, str]]
type Vector = dict[Labels, float]


@dataclass(frozen=True, slots=True)
class Scrape:
    """What every proxy told at one time, in seconds of a monotonic clock."""

    at: float
    samples: dict[tuple[str, Labels], float]

    @classmethod
    def of(cls, at: float, texts: dict[str, str]) -> "Scrape":
        """Read expositions, by instance."""
        samples = {}
        for instance, text in texts.items():
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    labels = frozenset({**sample.labels, "instance": instance}.items())
                    samples[sample.name, labels] = sample.value
        return cls(at, samples)


def panels() -> Iterator[dict[str, Any]]:
    """Give the dashboard's panels, its rows too."""
    yield from json.loads(DASHBOARD.read_text())["panels"]


def evaluate(query: str, scrapes: Sequence[Scrape]) -> Vector:
    """Give what a query says of the last scrape; a rate is over all of them."""
    for name, value in _VARIABLES.items():
        query = query.replace(name, value)
    return _evaluate(query.strip(), scrapes)


def _evaluate(query: str, scrapes: Sequence[Scrape]) -> Vector:
    call = _CALL.fullmatch(query)
    if call is None:
        return _select(query, scrapes[-1])
    name, by, inside = call.groups()
    kept = {label.strip() for label in (by or "").split(",")}
    if name in ("rate", "increase"):
        return _grown(inside, scrapes, per_second=name == "rate")
    if name in ("sum", "min", "max"):
        combine: Callable[[list[float]], float] = {"sum": sum, "min": min, "max": max}[name]
        groups: dict[Labels, list[float]] = {}
        for labels, value in _evaluate(inside, scrapes).items():
            groups.setdefault(frozenset(pair for pair in labels if pair[0] in kept), []).append(value)
        return {labels: combine(values) for labels, values in groups.items()}
    number, _, rest = inside.partition(",")
    vector = _evaluate(rest.strip(), scrapes)
    if name == "topk":
        return dict(sorted(vector.items(), key=lambda item: -item[1])[: int(number)])
    return _quantiles(float(number), vector)


def _select(query: str, scrape: Scrape) -> Vector:
    found = _SELECTOR.fullmatch(query.strip())
    assert found is not None, f"not understood: {query}"
    wanted = _MATCHER.findall(found[2] or "")

    def fits(labels: Labels) -> bool:
        values = dict(labels)
        return all(
            (re.fullmatch(value, values.get(name, "")) is not None if "~" in how else values.get(name, "") == value)
            != how.startswith("!")
            for name, how, value in wanted
        )

    return {labels: value for (name, labels), value in scrape.samples.items() if name == found[1] and fits(labels)}


def _grown(query: str, scrapes: Sequence[Scrape], *, per_second: bool) -> Vector:
    """Give how counters grew; one that is new began at nothing, as Prometheus's first look would not yet know."""
    now, before = _select(query, scrapes[-1]), _select(query, scrapes[0])
    seconds = scrapes[-1].at - scrapes[0].at if per_second else 1.0
    if seconds <= 0:
        return {}
    return {labels: max(0.0, value - before.get(labels, 0.0)) / seconds for labels, value in now.items()}


def _quantiles(part: float, vector: Vector) -> Vector:
    """Interpolate within the bucket that has the quantile, as Prometheus does; no value where nothing was counted."""
    buckets: dict[Labels, list[tuple[float, float]]] = {}
    for labels, value in vector.items():
        (bound,) = (value for name, value in labels if name == "le")
        rest = frozenset(pair for pair in labels if pair[0] != "le")
        buckets.setdefault(rest, []).append((float(bound), value))
    found = {}
    for labels, counts in buckets.items():
        counts.sort()
        wanted = part * counts[-1][1]
        if not wanted:
            continue
        lower, below = 0.0, 0.0
        for bound, count in counts:
            if count >= wanted:
                full = bound != float("inf")
                found[labels] = lower + (bound - lower) * (wanted - below) / (count - below) if full else lower
                break
            lower, below = bound, count
    return found
