"""Sliding window counters: the arithmetic, and a bounded memory to keep the counts in.

Reads a clock, and nothing else; one event loop uses it, so it needs no lock and no thread.
"""

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, override

from limits.storage import Storage
from limits.storage.base import SlidingWindowCounterSupport

MOST_PARTITIONS: Final = 100_000


def weighted(previous: int, current: int, share: float) -> float:
    """Estimate the requests of the last window: this one's, and of the one before the `share` it still covers."""
    return previous * share + current


def left_of(window: int, now: float) -> float:
    """Give the seconds until the clock-aligned window around `now` (Unix seconds) ends: above 0, at most `window`."""
    return window - now % window


def fits(previous: int, current: int, *, limit: int, window: int, left: float) -> bool:
    """Say whether one more request fits under `limit` when `left` seconds of the window remain; past its end too."""
    if left <= 0:
        previous, current, left = current, 0, left + window
    return math.floor(weighted(previous if left > 0 else 0, current, left / window)) < limit


def seconds_to_room(previous: int, current: int, *, limit: int, window: int, left: float) -> int:
    """Give the least whole seconds, at least 1, after which one more request fits if none comes until then.

    `left` is what remains of the window, in seconds. What can never fit is told to come in two windows.
    """
    if limit <= 0:
        return 2 * window
    if current < limit:
        estimate = left - (limit - current) / max(previous, 1) * window
    else:
        estimate = left + window - limit / current * window
    wait = max(1, math.floor(estimate))
    while not fits(previous, current, limit=limit, window=window, left=left - wait):
        wait += 1
    return wait


@dataclass(slots=True)
class _Counts:
    """Counts of one key: in the window numbered `index`, and in the one before."""

    index: int
    current: int
    previous: int


class BoundedMemoryStorage(Storage, SlidingWindowCounterSupport):
    """Counts in a bounded map, the longest unused dropped first; the storage of `bounded-memory://`.

    Replaces limits' MemoryStorage, whose scan thread takes most of a core at 100,000 keys.
    """

    STORAGE_SCHEME = ["bounded-memory"]  # noqa: RUF012  limits reads it off the class

    def __init__(
        self,
        uri: str | None = None,
        *,
        wrap_exceptions: bool = False,
        most: int = MOST_PARTITIONS,
        clock: Callable[[], float] = time.time,
        **options: float | str | bool,
    ) -> None:
        super().__init__(uri, wrap_exceptions, **options)
        self._most = most
        self._clock = clock
        self._counts: OrderedDict[str, _Counts] = OrderedDict()
        self.moment: float | None = None
        """While set, the time that counts (Unix seconds), so that one decision is of one moment."""

    @property
    @override
    def base_exceptions(self) -> type[Exception]:
        return ValueError

    def now(self) -> float:
        """Give the time that counts."""
        return self._clock() if self.moment is None else self.moment

    @override
    def acquire_sliding_window_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        now = self.now()
        counts = self._at(key, expiry, now)
        left = left_of(expiry, now)
        if not fits(counts.previous, counts.current, limit=limit - amount + 1, window=expiry, left=left):
            return False
        counts.current += amount
        return True

    @override
    def get_sliding_window(self, key: str, expiry: int) -> tuple[int, float, int, float]:
        now = self.now()
        counts = self._at(key, expiry, now)
        left = left_of(expiry, now)
        return counts.previous, left if counts.previous else 0.0, counts.current, left + expiry

    @override
    def clear_sliding_window(self, key: str, expiry: int) -> None:
        self._counts.pop(key, None)

    def _at(self, key: str, expiry: int, now: float) -> _Counts:
        index = int(now // expiry)
        counts = self._counts.get(key)
        if counts is None:
            counts = self._counts[key] = _Counts(index, 0, 0)
            if len(self._counts) > self._most:
                self._counts.popitem(last=False)
            return counts
        if index > counts.index:  # a clock that steps back turns no window
            counts.previous = counts.current if counts.index == index - 1 else 0
            counts.current = 0
            counts.index = index
        self._counts.move_to_end(key)
        return counts

    # The rest of limits' interface, which the sliding window does not use.

    @override
    def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        raise NotImplementedError

    @override
    def get(self, key: str) -> int:
        raise NotImplementedError

    @override
    def get_expiry(self, key: str) -> float:
        raise NotImplementedError

    @override
    def check(self) -> bool:
        return True

    @override
    def reset(self) -> int | None:
        dropped = len(self._counts)
        self._counts.clear()
        return dropped

    @override
    def clear(self, key: str) -> None:
        self._counts.pop(key, None)
