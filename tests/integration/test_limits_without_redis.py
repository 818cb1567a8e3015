"""What limits do while Redis does not do its work: paused, killed, full, read-only, failing over; and afterwards.

Every answer comes while Redis is still at fault, so that none of them can have waited for it. The log tells when this
begins and ends.
"""

import contextlib
import json
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.security.wire import Answer, Stub, exchange, head, json_answer, stub_upstream
from tests.support.principals import Principals
from tests.support.proxy import Proxy, start_proxy, stop_proxy
from tests.support.redis import Redis, running_redis, running_sentinel

SECRET = "the secret of the agent behind, 32+"
DEADLINE = 30.0
SETTINGS = {"PROXY_RATE_LIMIT": "8/100 days", "PROXY_CONCURRENCY_LIMIT": "4", "PROXY_REPLICAS": "4"}


class House:
    """A proxy before an upstream that answers everything, and a Redis to do things to."""

    def __init__(self, proxy: Proxy, stub: Stub, principals: Principals) -> None:
        self.proxy = proxy
        self.stub = stub
        self.principals = principals
        self.seen = 0

    def invoke(self, subject: str) -> Answer:
        """Invoke as `subject`."""
        token = self.principals.token(subject)
        fields = [("Authorization", f"Bearer {token}"), ("Content-Type", "application/json"), ("Content-Length", "13")]
        return exchange(self.proxy.url, head("POST", "/agent/invoke", *fields) + b'{"text":"hi"}')

    def health(self) -> list[int]:
        """Ask for life and readiness."""
        return [exchange(self.proxy.url, head("GET", f"/health/{kind}")).status for kind in ("live", "ready")]

    def event(self, name: str, meanwhile: Callable[[], object] = lambda: None) -> dict[str, Any]:
        """Wait for a line that was not yet waited for, doing something meanwhile."""
        deadline = time.monotonic() + DEADLINE
        while time.monotonic() < deadline:
            for number, line in enumerate(self.proxy.log_lines()):
                if number >= self.seen and line["event"] == name:
                    self.seen = number + 1
                    return line
            meanwhile()
            time.sleep(0.01)
        raise AssertionError(f"no {name}")


@contextlib.contextmanager
def house_of(directory: Path, url: str, **environment: str) -> Iterator[House]:
    """Run a proxy whose limits are on the Redis at `url`."""
    principals = Principals()
    with stub_upstream(lambda _: json_answer(b"{}")) as stub:
        settings = SETTINGS | {"PROXY_REDIS_URL": url} | principals.environment() | environment
        proxy = start_proxy(directory, stub.url, SECRET, **settings)
        try:
            yield House(proxy, stub, principals)
        finally:
            stop_proxy(proxy.process)


@pytest.fixture(scope="module")
def redis() -> Iterator[Redis]:
    """Run the Redis."""
    with running_redis() as running:
        yield running


@pytest.fixture(scope="module")
def local(redis: Redis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """Run a proxy that enforces its share: a quarter of eight."""
    with house_of(tmp_path_factory.mktemp("local"), redis.url) as house:
        yield house


def remaining(answer: Answer) -> int:
    """Read what is left of the rate."""
    match = re.match(r'"requests";r=(\d+)', answer.values("ratelimit")[0])
    assert match is not None
    return int(match[1])


FAULTS: dict[str, tuple[Callable[[Redis], object], Callable[[Redis], object]]] = {
    "paused": (lambda redis: redis.pause(), lambda redis: redis.resume()),
    "killed": (lambda redis: redis.kill(), lambda redis: redis.start()),
    "full": (lambda redis: redis.ask("CONFIG SET maxmemory 1"), lambda redis: redis.ask("CONFIG SET maxmemory 0")),
    "read-only": (lambda redis: redis.ask("REPLICAOF 127.0.0.1 1"), lambda redis: redis.ask("REPLICAOF NO ONE")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_proxy_enforces_its_share_and_tells_redis_afterwards(local: House, redis: Redis, fault: str) -> None:
    """While Redis is at fault a caller gets a quarter of his eight here, and the fields say so; nobody waits.

    When it is back the whole limit counts again, less what was admitted meanwhile.
    """
    break_it, mend_it = FAULTS[fault]
    before = local.invoke(f"steady-{fault}")
    assert before.values("ratelimit-policy") == ['"requests";q=8;w=8640000, "concurrency";q=4;qu="concurrent-requests"']

    local.seen = len(local.proxy.log_lines())
    break_it(redis)
    try:
        lost = local.event("limits.degraded", lambda: local.invoke(f"unlucky-{fault}-{time.monotonic_ns()}"))
        answers = [local.invoke(f"meanwhile-{fault}") for _ in range(3)]
        health = local.health()
    finally:
        mend_it(redis)
    found = local.event("limits.recovered")
    after = [local.invoke(f"meanwhile-{fault}") for _ in range(7)]

    assert lost["policy"] == "local"
    assert found["down_seconds"] > 0
    assert [answer.status for answer in answers] == [200, 200, 429]
    assert {answer.values("ratelimit-policy")[0] for answer in answers} == {
        '"requests";q=2;w=8640000, "concurrency";q=1;qu="concurrent-requests"'
    }
    assert health == [200, 200]
    assert [answer.status for answer in after] == [200] * 6 + [429]
    if fault != "killed":  # which forgot what it knew
        assert remaining(local.invoke(f"steady-{fault}")) == 6


def test_what_was_admitted_before_the_failure_counts_against_the_share(local: House, redis: Redis) -> None:
    """Who has had his quarter here gets none again because Redis fails: spread evenly, the total still holds."""
    before = [local.invoke("spender") for _ in range(2)]

    redis.pause()
    local.event("limits.degraded", lambda: local.invoke(f"unlucky-{time.monotonic_ns()}"))
    meanwhile = local.invoke("spender")
    redis.resume()
    local.event("limits.recovered")
    after = local.invoke("spender")

    assert [answer.status for answer in before] == [200, 200]
    assert meanwhile.status == 429
    assert (after.status, remaining(after)) == (200, 5)


def test_a_redis_that_forgot_the_script_is_told_it_again(local: House, redis: Redis) -> None:
    """Nobody notices: the script is loaded within the same decision."""
    local.invoke("reader")
    redis.ask("SCRIPT FLUSH")

    answers = [local.invoke("reader") for _ in range(3)]

    assert [remaining(answer) for answer in answers] == [6, 5, 4]


@pytest.mark.parametrize(("policy", "status"), [("refuse", 503), ("allow", 200)])
def test_the_other_policies_refuse_or_allow(policy: str, status: int, tmp_path: Path) -> None:
    """`refuse` answers 503 and is not ready; `allow` lets everybody in, and tells no limit. Alive are both."""
    with running_redis() as redis:
        redis.kill()
        with house_of(tmp_path, redis.url, PROXY_LIMITS_WITHOUT_REDIS=policy) as house:
            lost = house.event("limits.degraded")
            answers = [house.invoke("anybody") for _ in range(10)]
            health = house.health()
            redis.start()
            house.event("limits.recovered")
            after = house.invoke("another")
            ready = house.health()

    assert lost["policy"] == policy
    assert {answer.status for answer in answers} == {status}
    assert not [answer for answer in answers if answer.values("ratelimit")]
    if status == 503:
        problem = answers[0].problem()
        assert (problem["code"], answers[0].values("retry-after")) == ("limits_unavailable", ["1"])
    assert health == [200, 503 if status == 503 else 200]
    assert (after.status, remaining(after), ready) == (200, 7, [200, 200])


def offset_of(redis: Redis) -> int:
    """Say how far its replication has come."""
    return int(redis.ask_text("INFO replication").partition("master_repl_offset:")[2].split()[0])


def test_a_failover_is_followed(tmp_path: Path) -> None:
    """With Sentinel the limits go on at the replica that was promoted, with what it knew; it takes no restart.

    The first watcher went down with the machine of the master, as it seems, and says nothing.
    """
    with running_sentinel() as watched, socket.create_server(("127.0.0.1", 0)) as silent:
        first, second, watcher = watched.master, watched.replica, watched.watcher
        hosts = f"127.0.0.1:{silent.getsockname()[1]},127.0.0.1:{watcher.port}"
        with house_of(tmp_path, f"redis+sentinel://{hosts}/limits") as house:
            first_answers = [house.invoke("faithful") for _ in range(3)]
            written, deadline = offset_of(first), time.monotonic() + DEADLINE
            while offset_of(second) < written:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            first.kill()
            house.event("limits.degraded", lambda: house.invoke(f"unlucky-{time.monotonic_ns()}"))
            house.event("limits.recovered")
            answer = house.invoke("faithful")

    assert [remaining(each) for each in first_answers] == [7, 6, 5]
    assert remaining(answer) == 4


def test_signals_change_policies_keys_and_level_but_no_stream(redis: Redis, tmp_path: Path) -> None:
    """SIGHUP reads the files again; what is wrong in one leaves all as it was, and the log says what it is."""
    limits, level = tmp_path / "limits.toml", tmp_path / "level"
    limits.write_text('[[policies]]\nname = "requests"\nrate = "8/100 days"\n')
    level.write_text("info")
    files = {"PROXY_LIMITS_FILE": str(limits), "PROXY_LOG_LEVEL_FILE": str(level), "PROXY_RATE_LIMIT": ""}
    with house_of(tmp_path, redis.url, **files, PROXY_CONCURRENCY_LIMIT="") as house:
        first = house.invoke("reloaded")
        limits.write_text("nonsense")
        house.proxy.process.send_signal(signal.SIGHUP)
        refused = house.event("settings.reload_refused")
        second = house.invoke("reloaded")
        limits.write_text('[[policies]]\nname = "requests"\nrate = "5/100 days"\n')
        level.write_text("warning")
        house.proxy.process.send_signal(signal.SIGHUP)
        house.event("settings.reloaded")
        third = house.invoke("reloaded")

    assert [remaining(answer) for answer in (first, second, third)] == [7, 6, 2]
    assert "PROXY_LIMITS_FILE: not TOML" in json.dumps(refused["problems"])
