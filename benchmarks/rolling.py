"""`python -m benchmarks.rolling`: replaces the parts of an installation under load, and counts what fails.

Two proxies, three agents, both nginx, Postgres and Redis, on this machine; `--streams` are held at any time (200). A
stream longer than 30 s is cut as it is meant to be: agents and nginx let nothing go on for longer.
"""

import argparse
import asyncio
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from benchmarks.machine import describe_machine
from tests.support.installation import Installation, installed
from tests.support.load import Load, steady_load


async def roll(installation: Installation, *, streams: int, words: int, pace_ms: int) -> None:
    """Go through every tier and print a line for each."""
    print(f"{'':<34}{'took':>7}{'streams':>9}{'invokes':>9}{'failed':>8}{'invoke p50':>12}{'p99':>10}")

    @asynccontextmanager
    async def under_load(what: str) -> AsyncIterator[None]:
        began = time.monotonic()
        token = installation.principals.token("load")
        load: Load
        async with steady_load(
            installation.url, token, streams=streams, invoke_every=0.5, words=words, pace_ms=pace_ms
        ) as load:
            load.seconds.clear()
            yield
        print(_line(what, time.monotonic() - began, load), flush=True)

    async with under_load("nothing replaced"):
        await asyncio.sleep(10)
    async with under_load("each of 3 agents, in turn"):
        for address in tuple(installation.agents):
            await installation.replace_agent(address)
    async with under_load("each of 2 proxies, in turn"):
        for address in tuple(installation.proxies):
            await installation.replace_proxy(address)
    async with under_load("the workers of both nginx (HUP)"):
        for nginx in (installation.balancer, installation.edge):
            assert nginx is not None  # noqa: S101  they run
            installation.reload(nginx)
            await asyncio.sleep(3)


def _line(what: str, seconds: float, load: Load) -> str:
    for failure in load.failures[:5]:
        print(f"  {failure}")
    times = sorted(load.seconds)
    p50, p99 = (1000 * times[int(len(times) * part)] for part in (0.5, 0.99))
    figures = f"{seconds:>5.0f} s{load.streams:>9}{load.invokes:>9}{len(load.failures):>8}"
    return f"{what:<34}{figures}{p50:>9.0f} ms{p99:>7.0f} ms"


def main() -> None:
    """Run it once."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rolling")
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--words", type=int, default=6, help="of each stream")
    parser.add_argument("--pace", type=int, default=2500, help="milliseconds between them")
    parser.add_argument("--grace", type=int, default=60, help="seconds for which a proxy lets streams end")
    options = parser.parse_args()
    print(describe_machine(instructions=False).sentence().rpartition(",")[0])
    lasting = options.words * options.pace / 1000
    lengths = f"{options.streams} streams of {lasting:g} s at any time"
    print(f"{lengths}, two invokes a second; a proxy's grace {options.grace} s")
    with (
        tempfile.TemporaryDirectory(prefix="rolling-") as directory,
        installed(Path(directory), agents=3, proxies=2, PROXY_GRACE_SECONDS=str(options.grace)) as installation,
    ):
        asyncio.run(roll(installation, streams=options.streams, words=options.words, pace_ms=options.pace))


if __name__ == "__main__":
    main()
