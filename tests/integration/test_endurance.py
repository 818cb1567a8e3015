"""Nothing sticks and nothing grows: what `benchmarks/endurance.py` measures at full size, at a small one."""

from pathlib import Path

import pytest

from benchmarks.endurance import cancellations, crowd, drain, exhaustion, slow_readers, subject


@pytest.mark.parametrize("accept", ["*/*", "text/event-stream"])
async def test_readers_that_stop_fill_no_memory(tmp_path: Path, accept: str) -> None:
    """Upstream is held back; the others are served meanwhile; whoever reads on loses nothing."""
    async with subject(tmp_path) as one:
        figures = await slow_readers(one, count=5, megabytes=16, accept=accept)

    assert figures["grown_mib"] < 16
    assert figures["one_read_mib"] >= 15


async def test_clients_that_leave_at_any_moment_leave_nothing(tmp_path: Path) -> None:
    """Descriptors, of clients and of the pool, and the slots of runs are as before."""
    async with subject(tmp_path) as one:
        figures = await cancellations(one, count=300, at_once=30)

    assert figures["descriptors_more"] == figures["slots_lost"] == 0
    assert figures["grown_mib"] < 8


async def test_a_crowd_keeps_nobody_from_being_served(tmp_path: Path) -> None:
    """Idle connections and live streams at once; each stream is alive."""
    async with subject(tmp_path) as one:
        figures = await crowd(one, idle=150, streams=100)

    assert figures["streams"] == 100


async def test_descriptors_that_run_out_come_back(tmp_path: Path) -> None:
    """While there are none, what runs goes on; when there are again, everybody is served."""
    async with subject(tmp_path) as one:
        figures = await exhaustion(one, most=60)

    assert figures["served_s"] < 10


async def test_every_open_stream_hears_of_the_end(tmp_path: Path) -> None:
    """SIGTERM: each stream of events is told why, and the process ends with 0."""
    async with subject(tmp_path, PROXY_GRACE_SECONDS="1") as one:
        figures = await drain(one, streams=10, grace=1)

    assert (figures["told"], figures["status"]) == (10, 0)
