"""A bounded memory to keep counts in, in process: windows of every strategy, the longest unused forgotten first.

Reads a clock, and nothing else; one event loop uses it, so it needs no lock and no thread.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, override

from limits.storage import Storage
from limits.storage.base import MovingWindowSupport, SlidingWindowCounterSupport

from proxy.standings import fits, left_of

MOST_PARTITIONS: Final = 100_000
MOST_MOMENTS: Final = 1_000_000
"""What all moving windows together may hold; 8 bytes and a float each."""


@dataclass(slots=True)
class Counts:
    """Counts of one key: in the window of `window` seconds numbered `index`, and in the one before."""

    window: int
    index: int
    current: int
    previous: int


class BoundedMemoryStorage(Storage, SlidingWindowCounterSupport, MovingWindowSupport):
    """Counts in bounded maps, the longest unused dropped first; the storage of `bounded-memory://`.

    Replaces limits' MemoryStorage, whose scan thread takes most of a core at 100,000 keys. Fixed windows are aligned
    to the clock, as sliding ones are.
    """

    STORAGE_SCHEME = ["bounded-memory"]  # noqa: RUF012  limits reads it off the class

    def __init__(
        self,
        uri: str | None = None,
        *,
        wrap_exceptions: bool = False,
        most: int = MOST_PARTITIONS,
        most_moments: int = MOST_MOMENTS,
        clock: Callable[[], float] = time.time,
        **options: float | str | bool,
    ) -> None:
        super().__init__(uri, wrap_exceptions, **options)
        self._most = most
        self._most_moments = most_moments
        self._clock = clock
        self._counts: OrderedDict[str, Counts] = OrderedDict()
        self._moments: OrderedDict[str, deque[float]] = OrderedDict()
        self._held = 0
        self.moment: float | None = None
        """While set, the time that counts (Unix seconds), so that one decision is of one moment."""

    @property
    @override
    def base_exceptions(self) -> type[Exception]:
        return ValueError

    def now(self) -> float:
        """Give the time that counts."""
        return self._clock() if self.moment is None else self.moment

    def add(self, key: str, window: int, amount: int) -> tuple[int, int]:
        """Charge what was used already, room or not; give the last window's count and this one's.

        An amount below 0 is given back.
        """
        counts = self.at(key, window, self.now())
        counts.current = max(0, counts.current + amount)
        return counts.previous, counts.current

    @override
    def acquire_sliding_window_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        now = self.now()
        counts = self.at(key, expiry, now)
        left = left_of(expiry, now)
        if not fits(counts.previous, counts.current, limit=limit - amount + 1, window=expiry, left=left):
            return False
        counts.current += amount
        return True

    @override
    def get_sliding_window(self, key: str, expiry: int) -> tuple[int, float, int, float]:
        now = self.now()
        counts = self.at(key, expiry, now)
        left = left_of(expiry, now)
        return counts.previous, left if counts.previous else 0.0, counts.current, left + expiry

    @override
    def clear_sliding_window(self, key: str, expiry: int) -> None:
        self._counts.pop(key, None)

    @override
    def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        return self.add(key, expiry, amount)[1]

    @override
    def get(self, key: str) -> int:
        counts = self._counts.get(key)
        return self.at(key, counts.window, self.now()).current if counts is not None else 0

    @override
    def get_expiry(self, key: str) -> float:
        counts, now = self._counts.get(key), self.now()
        return now + (left_of(counts.window, now) if counts is not None else 0)

    @override
    def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        moments = self._moments_of(key, expiry)
        if len(moments) + amount > limit:
            return False
        moments.extend([self.now()] * amount)
        self._held += amount
        while self._held > self._most_moments or len(self._moments) > self._most:
            self._held -= len(self._moments.popitem(last=False)[1])
        return True

    @override
    def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:
        moments = self._moments_of(key, expiry)
        return moments[0] if moments else self.now(), len(moments)

    def moment_at(self, key: str, place: int) -> float:
        """Give when the `place`th oldest request that still counts in a moving window came, from 0."""
        return self._moments[key][place]

    def _moments_of(self, key: str, window: int) -> deque[float]:
        moments = self._moments.get(key)
        if moments is None:
            moments = self._moments[key] = deque()
            if len(self._moments) > self._most:
                self._held -= len(self._moments.popitem(last=False)[1])
            return moments
        since = self.now() - window
        while moments and moments[0] <= since:
            moments.popleft()
            self._held -= 1
        self._moments.move_to_end(key)
        return moments

    def at(self, key: str, window: int, now: float) -> Counts:
        """Give the counts of a key as of `now` (Unix seconds), to be read and added to at once."""
        index = int(now // window)
        counts = self._counts.get(key)
        if counts is None:
            counts = self._counts[key] = Counts(window, index, 0, 0)
            if len(self._counts) > self._most:
                self._counts.popitem(last=False)
            return counts
        if index > counts.index:  # a clock that steps back turns no window
            counts.previous = counts.current if counts.index == index - 1 else 0
            counts.current = 0
            counts.index = index
        self._counts.move_to_end(key)
        return counts

    @override
    def check(self) -> bool:
        return True

    @override
    def reset(self) -> int | None:
        dropped = len(self._counts) + len(self._moments)
        self._counts.clear()
        self._moments.clear()
        self._held = 0
        return dropped

    @override
    def clear(self, key: str) -> None:
        self._counts.pop(key, None)
        self._held -= len(self._moments.pop(key, ()))
