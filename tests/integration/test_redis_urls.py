"""Each form of `PROXY_REDIS_URL`, on a real server that is reached so: exact in each, few round trips, nobody forged.

Four sets of limits in this process are four proxies to Redis.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from proxy.admission import Limits, limits_of
from proxy.errors import RateExceeded
from proxy.limitsettings import LimitSettings
from proxy.model import CredentialKind, Lease, Principal
from proxy.notices import Notices
from proxy.operations import OPERATIONS
from tests.support.redis import Redis, cluster_info, running_cluster, running_redis
from tests.support.replicas import until
from tests.support.tls import Authority

INVOKE = next(row for row in OPERATIONS if row.name == "invoke")
SINGLE = """
[[policies]]
name = "requests"
rate = "40/100 days;1000/300 days"

[[policies]]
name = "runs"
concurrency = 7

[[policies]]
name = "tokens"
tokens = "1000/100 days"
"""
TOGETHER = f"""
{SINGLE}
[[policies]]
name = "tenant"
rate = "60/100 days"
per = "tenant"

[[policies]]
name = "house"
concurrency = 9
per = "all"
"""


@pytest.fixture(scope="module")
def redis() -> Iterator[Redis]:
    """Run a Redis that has a socket in the file system too."""
    with running_redis() as running:
        running.kill()
        running.start("--unixsocket", "socket")
        yield running


@pytest.fixture(scope="module")
def cluster() -> Iterator[list[Redis]]:
    """Run a cluster."""
    with running_cluster() as nodes:
        yield nodes


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Make the operator's own certificate authority."""
    return Authority(tmp_path_factory.mktemp("tls"), "ours")


class Four:
    """Four proxies' limits."""

    def __init__(self, limits: Sequence[Limits]) -> None:
        self.limits = limits
        self.held: list[Lease] = []

    async def admitted(self, who: str, count: int, *, at: int | None = None, ends: bool = False) -> int:
        """Ask `count` times at once, everywhere or at one of them; give how many were admitted, and hold their runs."""
        caller = Principal(who, who, f"key:{who}", frozenset(), CredentialKind.API_KEY, tenant="acme")

        async def ask(number: int) -> int:
            try:
                lease = await self.limits[number % 4 if at is None else at].admit(caller, who, INVOKE)
            except RateExceeded:
                return 0
            if ends:
                lease.release()
            else:
                self.held.append(lease)
            return 1

        return sum(await asyncio.gather(*map(ask, range(count))))

    async def end(self) -> None:
        """End every run, and wait until Redis knows."""
        while self.held:
            self.held.pop().release()
        await until(lambda: not any(each._shared._outstanding._freed for each in self.limits if each._shared))

    async def until_degraded(self, *, degraded: bool) -> None:
        """Wait until all of them do without Redis, or none does; callers of every slot ask meanwhile."""
        numbers = iter(range(1_000_000))
        while {each.is_degraded for each in self.limits} != {degraded}:
            asked = [self.admitted(f"slot-{next(numbers)}", 4, ends=True) for _ in range(20 if degraded else 0)]
            await asyncio.gather(*asked, asyncio.sleep(0.02))


@asynccontextmanager
async def four_at(url: str, text: str, *, timeout: float = 5, lease_seconds: float = 25) -> AsyncIterator[Four]:  # noqa: ASYNC109  a setting
    """Build four, as their settings say."""
    settings = LimitSettings.model_validate(
        {"redis_url": url, "limits": text, "redis_timeout_seconds": timeout, "lease_seconds": lease_seconds}
        | {"replicas": 4}
    )
    limits = [limits_of(settings, partition_of=str) for _ in range(4)]
    async with AsyncExitStack() as stack:
        for each in limits:
            await stack.enter_async_context(each.watching())
        yield Four(limits)


async def heard(url: str) -> bool:
    """Say whether a notice that is sent by one proxy is heard by another."""
    times: list[None] = []
    ear, mouth = Notices(url, prefix="p"), Notices(url, prefix="p")
    async with ear.listening(lambda: times.append(None)):
        await until(lambda: len(times) == 1)  # it listens
        reason = await mouth.announce()
        await until(lambda: len(times) == 2)
    await mouth.close()
    return not reason


async def check(url: str) -> None:
    """Hold that limits at `url` are exact, for one caller, for a tenant and over all."""
    async with four_at(url, SINGLE) as four:
        await four.until_degraded(degraded=False)  # to connect may take longer than a start waits
        most = await asyncio.gather(*(four.admitted(f"run-{who}", 300) for who in "abc"))
        await four.end()
        again = await four.admitted("run-a", 300)
        await four.end()
        total = sum([await four.admitted("rated", 5, ends=True) for _ in range(12)])
        assert not any(each.is_degraded for each in four.limits)
    assert (most, again, total) == ([7, 7, 7], 7, 40)
    async with four_at(url, TOGETHER) as four:
        await four.until_degraded(degraded=False)  # to connect may take longer than a start waits
        members = await asyncio.gather(*(four.admitted(f"member-{who}", 100) for who in "abc"))
        await four.end()
        later = sum([await four.admitted(f"guest-{number}", 4, ends=True) for number in range(20)])
        assert not any(each.is_degraded for each in four.limits)
    assert (sum(members), later) == (9, 51)
    assert await heard(url)


async def test_a_socket_in_the_file_system(redis: Redis) -> None:
    """`unix://` with the path of the socket."""
    await check(f"unix://{redis.directory}/socket?db=1")


async def test_tls_with_an_authority_of_ones_own(redis: Redis, authority: Authority) -> None:
    """`rediss://`, where the URL names the authority's certificate."""
    async with authority.before(redis.port) as port:
        await check(f"rediss://127.0.0.1:{port}/2?ssl_ca_certs={authority.ca}")


async def test_a_cluster(cluster: list[Redis]) -> None:
    """Each caller's counts are in one slot; where policies count callers together, all counts of all are in one."""
    await check("redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in cluster))

    keys = [[key for key in node.ask_all("KEYS *") if "probe" not in key] for node in cluster]
    for slot in [key for some in keys for key in some]:
        assert re.match(r"agentflow-proxy:\{[^{}]+\}:|\{agentflow-proxy\}:", slot)
    assert all(any(key.startswith("agentflow-proxy:") for key in some) for some in keys)
    assert [any(key.startswith("{agentflow-proxy}:") for key in some) for some in keys].count(True) == 1


async def test_a_cluster_over_tls(cluster: list[Redis], authority: Authority) -> None:
    """`rediss+cluster://`: nodes that tell each other's TLS ports are found, and believed by the same authority."""
    async with AsyncExitStack() as stack:
        ports = [await stack.enter_async_context(authority.before(node.port)) for node in cluster]
        for node, port in zip(cluster, ports, strict=True):
            node.ask(f"CONFIG SET cluster-announce-port {port}")
        await until(lambda: all(str(port) in node.ask_text("CLUSTER NODES") for node in cluster for port in ports))
        try:
            async with four_at(f"rediss+cluster://127.0.0.1:{ports[0]}?ssl_ca_certs={authority.ca}", SINGLE) as four:
                await four.until_degraded(degraded=False)
                assert await four.admitted("secured", 100) == 7
                assert not any(each.is_degraded for each in four.limits)
                await four.end()
        finally:
            for node in cluster:
                node.ask("CONFIG SET cluster-announce-port 0")


async def test_a_server_that_another_authority_vouches_for_is_not_believed(
    redis: Redis, authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever sits between proxy and Redis learns no counts and decides nothing: each proxy goes on with its share."""
    other = Authority(tmp_path, "theirs")
    async with (
        other.before(redis.port) as port,
        four_at(f"rediss://127.0.0.1:{port}/3?ssl_ca_certs={authority.ca}", SINGLE) as four,
    ):
        shares = [await four.admitted("forged", 20, at=number) for number in range(4)]
        assert all(each.is_degraded for each in four.limits)
        four.held.clear()

    assert shares == [1, 1, 1, 1]
    assert redis.ask_text("INFO keyspace").find("db3") == -1
    assert "limits.degraded" in [record.getMessage() for record in caplog.records]


async def test_leases_in_a_cluster_are_renewed_while_a_master_is_away_and_counts_are_exact_again(
    cluster: list[Redis],
) -> None:
    """A master that hangs takes all with it: each proxy enforces its share until it is back, and tells it all then."""
    url = "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in cluster)
    async with four_at(url, SINGLE, timeout=0.75, lease_seconds=2) as four:
        await four.until_degraded(degraded=False)
        assert await four.admitted("long", 1) == 1
        before = [await four.admitted("steady", 2, at=number, ends=True) for number in range(4)]
        await until(lambda: not any(each._shared._outstanding._freed for each in four.limits if each._shared))

        cluster[1].pause()
        try:
            await four.until_degraded(degraded=True)
            meanwhile = [await four.admitted("steady", 20 if number == 0 else 1, at=number) for number in range(4)]
            for lease in four.held[1:]:
                lease.release()
            del four.held[1:]
            rated = sum([await four.admitted("steady", 1, at=0, ends=True) for _ in range(20)])
            await until(lambda: "cluster_state:fail" in cluster_info(cluster[0]))
        finally:
            cluster[1].resume()
        await four.until_degraded(degraded=False)
        after = sum([await four.admitted("steady", 4, ends=True) for _ in range(20)])
        runs = await four.admitted("long", 40)

    assert before == [2, 2, 2, 2]
    assert (meanwhile, rated) == ([1, 1, 1, 1], 7)
    assert after == 40 - 8 - 4 - 7
    assert runs == 6


def counted(redis: Redis) -> tuple[int, int]:
    """Give how many scripts Redis has run, and how often it has read from a connection."""
    told = redis.ask_text("INFO stats commandstats")
    numbers = [re.search(rf"{name}(\d+)", told) for name in ("cmdstat_evalsha:calls=", "total_reads_processed:")]
    scripts, reads = [int(number[1]) if number else -1 for number in numbers]
    return scripts, reads


async def test_a_decision_is_one_command_and_many_at_once_share_a_round_trip(redis: Redis) -> None:
    """Two windows, runs and tokens cost one command, read at once; a hundred requests cost it a few reads together."""
    many = SINGLE.replace("= 7", "= 1000").replace('"40/', '"999/')
    url = redis.url.replace("/0", "/4")
    limits = limits_of(LimitSettings.model_validate({"redis_url": url, "limits": many}), partition_of=str)
    four, spent = Four([limits] * 4), list[tuple[int, int]]()
    await four.admitted("warm", 2)
    for times, at_once in ((10, 1), (1, 100)):
        scripts, reads = counted(redis)
        for _ in range(times):
            assert await four.admitted("counted", at_once) == at_once
        after = counted(redis)
        spent.append((after[0] - scripts, after[1] - reads - 2))  # this question, and the end of the last one
    assert limits._shared is not None
    await limits._shared.close()

    assert spent[0] == (10, 10)
    assert spent[1][0] == 100
    assert spent[1][1] <= 5
