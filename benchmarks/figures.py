"""The figures of a contender: one sample per round, medians and spread over the rounds.

Pure: measures and prints nothing.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from statistics import median


@dataclass(frozen=True, slots=True)
class Figure:
    """What one column says, its unit, and how to print a value."""

    key: str
    title: str
    unit: str
    digits: int = 0
    ours_only: bool = False


FIGURES: tuple[Figure, ...] = (
    Figure("invoke_cpu_us", "CPU per invoke, 16 in flight", "µs"),
    Figure("invoke_cpu_us_1", "CPU per invoke, 1 in flight", "µs"),
    Figure("invoke_instructions_k", "instructions per invoke", "k"),
    Figure("invoke_rate", "invokes per second", "1/s"),
    Figure("added_p50_us_1", "added latency, 1 in flight, p50", "µs"),
    Figure("added_p99_us_1", "added latency, 1 in flight, p99", "µs"),
    Figure("added_p50_us_16", "added latency, 16 in flight, p50", "µs"),
    Figure("added_p99_us_16", "added latency, 16 in flight, p99", "µs"),
    Figure("event_cpu_us", "CPU per paced event", "µs", 1),
    Figure("event_instructions_k", "instructions per paced event", "k"),
    Figure("event_added_p50_us", "added lateness per event, p50", "µs"),
    Figure("event_added_p99_us", "added lateness per event, p99", "µs"),
    Figure("first_byte_us", "time to first byte", "µs"),
    Figure("burst_cpu_us", "CPU per burst event", "µs", 2),
    Figure("burst_instructions_k", "instructions per burst event", "k", 1),
    Figure("refuse_401_cpu_us", "CPU per 401", "µs", ours_only=True),
    Figure("refuse_401_instructions_k", "instructions per 401", "k", ours_only=True),
    Figure("refuse_429_cpu_us", "CPU per 429", "µs", ours_only=True),
    Figure("refuse_429_instructions_k", "instructions per 429", "k", ours_only=True),
    Figure("errors", "wrong or missing answers", ""),
)

OPEN_FIGURES: tuple[Figure, ...] = (
    Figure("kib", "memory per stream", "KiB", 1),
    Figure("cpu_percent", "CPU", "% of a core"),
    Figure("late_p50_us", "lateness, p50", "µs"),
    Figure("late_p99_us", "lateness, p99", "µs"),
    Figure("errors", "not opened or broken off", ""),
    Figure("starved", "starved", ""),
)


def open_key(count: int, figure: Figure) -> str:
    """Give the key of a figure of `count` open streams."""
    return f"open_{count}_{figure.key}"


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of the rounds, and the least and most of them."""

    median: float
    least: float
    most: float
    rounds: int

    @classmethod
    def of(cls, samples: Iterable[float]) -> "Spread | None":
        """Summarize `samples`; None when there are none."""
        values = sorted(samples)
        return cls(median(values), values[0], values[-1], len(values)) if values else None


@dataclass(slots=True)
class Result:
    """What is known of one contender: its samples, or why it is absent."""

    key: str
    title: str
    job: str
    ours: bool = False
    version: str = ""
    absent: str = ""
    samples: dict[str, list[float]] = field(default_factory=dict)

    def add(self, values: dict[str, float]) -> None:
        """Add one round's values."""
        for key, value in values.items():
            self.samples.setdefault(key, []).append(value)

    def spread(self, key: str) -> Spread | None:
        """Summarize one figure."""
        return Spread.of(self.samples.get(key, ()))

    def as_dict(self) -> dict[str, object]:
        """Give plain values for JSON."""
        figures = {key: spread for key in self.samples if (spread := self.spread(key)) is not None}
        plain = {name: getattr(self, name) for name in ("key", "title", "job", "ours", "version", "absent")}
        return plain | {"figures": {key: asdict(spread) for key, spread in figures.items()}}
