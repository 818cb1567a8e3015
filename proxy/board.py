"""What several worker processes have counted, side by side in shared memory, so that each can tell of all.

A worker writes its own place and reads everybody's; nobody waits for anybody, and a dead worker's place stays.
"""

import json
import mmap
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Final

from proxy.families import FAMILIES
from proxy.metrics import Metrics, Snapshot, merged

PUBLISH_SECONDS: Final = 1.0
_FRESH_SECONDS: Final = 5.0
"""A place that was written longer ago is nobody's any more: its counters count, its gauges do not."""
_HALF: Final = 512 * 1024
_HEAD: Final = "<QdII"
_HEAD_SIZE: Final = 24


class Board:
    """Places in anonymous memory. The file descriptor is what a child process is given to open the same board.

    Each place has two halves that are written in turn, so that a worker killed while it writes leaves the other one.
    """

    def __init__(self, descriptor: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, 0)
        self.places = len(self._memory) // (2 * _HALF)
        self._clock = clock

    @classmethod
    def create(cls, places: int) -> "Board":
        """Make an empty board; the memory is only used as it is written."""
        descriptor = os.memfd_create("agentflow-proxy-metrics", 0)
        os.ftruncate(descriptor, places * 2 * _HALF)
        return cls(descriptor)

    def write(self, place: int, snapshot: Snapshot, *, leaving: bool = False) -> None:
        """Put a worker's numbers into its place; one that is `leaving` has no gauges any more."""
        payload = zlib.compress(json.dumps(snapshot, separators=(",", ":")).encode(), 1)
        if len(payload) > _HALF - _HEAD_SIZE:
            return  # cannot be: labels have few values
        generation = max(head[0] for head in self._heads(place)) + 1
        at = (2 * place + generation % 2) * _HALF
        self._memory[at + _HEAD_SIZE : at + _HEAD_SIZE + len(payload)] = payload
        head = struct.pack(_HEAD, generation, 0.0 if leaving else self._clock(), len(payload), zlib.crc32(payload))
        self._memory[at : at + _HEAD_SIZE] = head

    def read(self, place: int) -> Snapshot | None:
        """Give the last numbers that were put there whole; the gauges only if that was just now."""
        for head, half in sorted(zip(self._heads(place), (0, 1), strict=True), reverse=True):
            generation, written, length, check = head
            start = (2 * place + half) * _HALF + _HEAD_SIZE
            payload = self._memory[start : start + min(length, _HALF)]
            if generation and zlib.crc32(payload) == check:
                rows = json.loads(zlib.decompress(payload)).items()
                is_fresh = self._clock() - written < _FRESH_SECONDS
                return {
                    name: [(tuple(labels), values) for labels, values in family]
                    for name, family in rows
                    if is_fresh or FAMILIES[name].kind != "gauge"
                }
        return None

    def _heads(self, place: int) -> Iterator[tuple[int, float, int, int]]:
        for half in (0, 1):
            yield struct.unpack_from(_HEAD, self._memory, (2 * place + half) * _HALF)

    def gather(self, place: int, own: Snapshot) -> Snapshot:
        """Give the numbers of all workers as one, with `own` for those of the worker at `place`."""
        others = (self.read(other) for other in range(self.places) if other != place)
        return merged([own, *(snapshot for snapshot in others if snapshot is not None)])


class Place:
    """One worker's place on a board: takes up the counters that it finds there, and publishes its own."""

    def __init__(self, board: Board, number: int, metrics: Metrics) -> None:
        self._board = board
        self._number = number
        self._metrics = metrics
        if (before := board.read(number)) is not None:
            metrics.continue_from(before)

    def publish(self, *, leaving: bool = False) -> None:
        """Show the numbers as they are."""
        self._board.write(self._number, self._metrics.snapshot(), leaving=leaving)

    def gather(self) -> Snapshot:
        """Give the numbers of all workers."""
        return self._board.gather(self._number, self._metrics.snapshot())
