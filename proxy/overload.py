"""When the proxy itself has too much to do: new work is refused, the lowest tier's first; what runs goes on.

Two measures: how late the event loop is, and how many runs are open. Reads no body, and charges nothing.
"""

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from proxy.outages import ReducedCapacity

log: Final = logging.getLogger("agentflow_proxy.overload")
PROBE_SECONDS: Final = 0.05
CALM_SECONDS: Final = 5.0
"""After the last refusal, until it is over: a threshold that is reached again and again is one overload."""
MOST_TIERS: Final = 6
_SMOOTHING: Final = 0.2
"""A probe's weight: one late turn of the loop is no overload, five in a row are."""


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Where the highest tier is refused: the loop's lag in seconds, the runs open; infinite: never.

    `tiers` are named from the lowest to the highest; each is refused a tenth of the thresholds before the next.
    A tier that is not named is the lowest.
    """

    loop_lag: float = math.inf
    open_runs: float = math.inf
    tiers: Sequence[str] = ("default",)

    def tiers_above(self, tier: str) -> int:
        """Say how many tiers go before `tier`."""
        return len(self.tiers) - 1 - (self.tiers.index(tier) if tier in self.tiers else 0)

    def least(self, tier: str) -> tuple[float, float]:
        """Give the lag and the open runs from which on `tier` is refused."""
        tenths = 10 - self.tiers_above(tier)
        runs = self.open_runs if math.isinf(self.open_runs) else max(1, math.ceil(self.open_runs * tenths / 10))
        return self.loop_lag * tenths / 10, runs


class Overload:
    """What this process carries, and whether it takes on more. `ticks` is in seconds of a monotonic clock."""

    def __init__(self, thresholds: Thresholds, *, ticks: Callable[[], float] = time.monotonic) -> None:
        self._thresholds = thresholds
        self._ticks = ticks
        self._least_lag, self._least_runs = thresholds.least("")
        self.loop_lag = 0.0
        """Seconds that the event loop is late, smoothed."""
        self.open_runs = 0
        """Runs that were taken on and have not ended; who relays them counts them."""
        self.refused = 0
        """Requests refused in this overload, or in the last."""
        self._began: float | None = None
        self._last_refusal = 0.0

    def require_room(self, tier: str) -> None:
        """Raise ReducedCapacity when new work of this tier has to wait."""
        if self.loop_lag < self._least_lag and self.open_runs < self._least_runs:
            return
        lag, runs = self._thresholds.least(tier)
        if self.loop_lag >= lag:
            self._refuse(tier, "loop lag")
        if self.open_runs >= runs:
            self._refuse(tier, "open runs")

    def note_end(self) -> None:
        """Take in that a run has ended whose request was over before."""
        self.open_runs -= 1

    def note_turn(self, late: float) -> None:
        """Take in how late a turn of the loop was, in seconds; tell when an overload is over."""
        self.loop_lag += (max(late, 0.0) - self.loop_lag) * _SMOOTHING
        if self._began is not None and self._ticks() - self._last_refusal >= CALM_SECONDS:
            seconds = round(self._last_refusal - self._began, 3)
            log.warning("overload.ended", extra={"fields": {"seconds": seconds, "refused": self.refused}})
            self._began = None

    @asynccontextmanager
    async def watching(self) -> AsyncGenerator[None]:
        """Measure the event loop, as long as the context lasts; without thresholds there is nothing to measure for."""
        if math.isinf(self._least_lag) and math.isinf(self._least_runs):
            yield
            return
        self._schedule(asyncio.get_running_loop())
        try:
            yield
        finally:
            self._probe.cancel()

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        due = loop.time() + PROBE_SECONDS

        def probe() -> None:
            self.note_turn(loop.time() - due)
            self._schedule(loop)

        self._probe = loop.call_at(due, probe)

    def _refuse(self, tier: str, measure: str) -> None:
        self._last_refusal = self._ticks()
        if self._began is None:
            self._began, self.refused = self._last_refusal, 0
            fields = {"measure": measure, "loop_lag_ms": round(self.loop_lag * 1000), "open_runs": self.open_runs}
            log.warning("overload.began", extra={"fields": fields})
        self.refused += 1
        raise ReducedCapacity(retry_after=1 + self._thresholds.tiers_above(tier), reason=measure)
