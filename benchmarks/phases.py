"""What each phase of our own request costs, in process: a slow phase names itself.

Runs with the product's interpreter; `PHASES` follows `proxy.routes`, add a row where that gains a phase.
"""

import asyncio
import io
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import uvloop

from benchmarks.arena import stand_stub
from benchmarks.contenders.model import NEVER, Place
from benchmarks.contenders.ours import environment
from benchmarks.processes import choose_cores
from benchmarks.tokens import AGENT_SECRET, AUDIENCE, ISSUER, SECRET, make_body, make_token
from proxy.app import create_app
from proxy.authorization import authorize
from proxy.credentials import BearerToken, read_credential
from proxy.forwarding import request_upstream
from proxy.limits import RateLimit
from proxy.model import Principal, UpstreamRequest
from proxy.operations import OPERATIONS
from proxy.relay import Relay
from proxy.server import configure_logging
from proxy.settings import Settings, load
from proxy.tenancy import RunRules, bind_run, tag_of
from proxy.tokens import InternalIdentity, TokenRules, TokenVerifier
from proxy.upstream import Pool

ROUNDS = 7
FEW = 2_000
MANY = 20_000
INVOKE = next(row for row in OPERATIONS if row.path == "/agent/invoke")


@dataclass(frozen=True, slots=True)
class Phase:
    """One row: what runs, whether it is a part of every invoke, and how to run it once."""

    name: str
    every_time: bool
    run: Callable[[], object]


def measure(run: Callable[[], object], times: int) -> float:
    """Give the µs of CPU of one call, the median of several loops."""
    samples = []
    for _ in range(ROUNDS):
        start = time.process_time_ns()
        for _ in range(times):
            run()
        samples.append((time.process_time_ns() - start) / times / 1000)
    return median(samples)


def make_phases() -> tuple[list[Phase], UpstreamRequest]:
    """Prepare every phase with the values that the one before it gives."""
    token = make_token("caller-0")
    headers = [
        (b"host", b"127.0.0.1"),
        (b"authorization", f"Bearer {token}".encode()),
        (b"content-type", b"application/json"),
        (b"accept", b"application/x-ndjson, application/json"),
        (b"user-agent", b"bench"),
    ]
    verifier = TokenVerifier(TokenRules(SECRET, ISSUER, AUDIENCE, 10.0), time.time)
    principal: Principal = verifier.verify(token)
    permit = authorize(principal, INVOKE)
    limit = RateLimit(f"{NEVER}/minute", "requests")
    secret = AGENT_SECRET.encode()
    tag = tag_of(principal.namespace, secret)
    rules = RunRules(allow_system=False, max_recursion=50, standing_thread=False)
    identity = InternalIdentity(AGENT_SECRET, issuer="agentflow-proxy", audience="agentflow", clock=time.time)
    body, _ = bind_run(make_body(), tag=tag, rules=rules, new_name=lambda: uuid.uuid4().hex)

    def authenticate() -> Principal | None:
        credential = read_credential(headers)
        return verifier.recall(credential.text) if isinstance(credential, BearerToken) else None

    def forward() -> UpstreamRequest:
        return request_upstream(
            permit,
            parameters={},
            query=b"",
            headers=headers,
            body=body,
            identity=identity.token(principal),
            request_id=b"0" * 32,
        )

    phases = [
        Phase("authentication: known token", True, authenticate),
        Phase("authentication: new token", False, lambda: verifier.verify(token)),
        Phase("policy: authorize", True, lambda: authorize(principal, INVOKE)),
        Phase("limit: tag and spend", True, lambda: limit.spend(tag_of(principal.namespace, secret), 1)),
        Phase("tenancy: bind the body", True, lambda: bind_run(make_body_once, tag=tag, rules=rules, new_name=str)),
        Phase("forward: headers and identity", True, forward),
    ]
    return phases, forward()


make_body_once = make_body()


async def _discard(message: Any) -> None:  # noqa: ANN401  an ASGI message
    del message


def _receiver(body: bytes) -> Callable[[], Awaitable[dict[str, Any]]]:
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if waiting:
            return waiting.pop()
        await asyncio.get_running_loop().create_future()
        return {"type": "http.disconnect"}

    return receive


def _scope(token: str) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/agent/invoke",
        "raw_path": b"/agent/invoke",
        "query_string": b"",
        "root_path": "",
        "client": ("127.0.0.1", 50_000),
        "server": ("127.0.0.1", 8000),
        "headers": [
            (b"authorization", f"Bearer {token}".encode()),
            (b"content-type", b"application/json"),
            (b"accept", b"application/x-ndjson, application/json"),
        ],
    }


async def _measure_awaited(run: Callable[[], Awaitable[object]]) -> float:
    samples = []
    for _ in range(ROUNDS):
        start = time.process_time_ns()
        for _ in range(FEW):
            await run()
        samples.append((time.process_time_ns() - start) / FEW / 1000)
    return median(samples)


async def measure_io(settings: Settings, request: UpstreamRequest) -> tuple[float, float]:
    """Give the µs of relaying one answer from the stub, and of a whole request without the server around it."""
    pool = Pool(settings.agent_url, most=16, most_idle=16, idle_seconds=60)
    relay = Relay(pool)
    deadlines = settings.run_deadlines()
    alone = await _measure_awaited(lambda: relay.relay(request, deadlines, _receiver(b""), _discard))
    pool.close()
    app = create_app(settings)
    token = make_token("caller-0")
    whole = await _measure_awaited(lambda: app(_scope(token), _receiver(make_body_once), _discard))
    return alone, whole


def main() -> int:
    """Print the table."""
    near, far = choose_cores()
    configure_logging("info", io.StringIO() if "--no-line" in sys.argv else Path(os.devnull).open("w"))  # noqa: SIM115
    phases, request = make_phases()
    with tempfile.TemporaryDirectory(prefix="bench-") as name, stand_stub(Path(name), near) as stub:
        os.sched_setaffinity(0, {far})
        place = Place(Path(name), 0, stub.port, (0, 0), Path(name))
        relay, whole = uvloop.run(measure_io(load(environment(place)), request))
        known = relay
        print(f"{'phase':<34} {'µs':>8} {'share':>7}")
        for phase in phases:
            spent = measure(phase.run, MANY if phase.every_time else FEW)
            known += spent if phase.every_time else 0.0
            share = f"{spent / whole:>7.0%}" if phase.every_time else f"{'once':>7}"
            print(f"{phase.name:<34} {spent:>8.1f} {share}")
        print(f"{'relay: upstream and back':<34} {relay:>8.1f} {relay / whole:>7.0%}")
        print(f"{'rest: routing, access line':<34} {whole - known:>8.1f} {(whole - known) / whole:>7.0%}")
        print(f"{'whole, without the server':<34} {whole:>8.1f} {1:>7.0%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
