"""`check --live`: asks each dependency of a proxy what a proxy will want of it, and says in words what is wrong.

Changes nothing anywhere; shows no secret, and nothing of an answer but what it means.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, Final, Literal

import httpx

from proxy.issuers import Issuer
from proxy.jwks import DocumentError, Fetcher, RemoteKeys
from proxy.keystore import SqlKeyStore
from proxy.model import CredentialKind, Principal
from proxy.operations import NOT_EXPOSED, NOT_EXPOSED_PREFIXES, OPERATIONS, Kind
from proxy.origin import Origin
from proxy.outages import KeyStoreDown
from proxy.redisclient import FAULTS, connect, reason_of
from proxy.settings import Settings
from proxy.tokens import InternalIdentity

PATIENCE_SECONDS: Final = 5.0
SKEW_SECONDS: Final = 5.0
"""More than this between two clocks is wrong; the internal token lives for a minute."""
_OPERATORS_OWN: Final = ("/ping", "/health", "/docs", "/redoc", "/openapi.json", "/metrics")
"""Routes of the sidecar that are for who runs it."""

type Verdict = Literal["ok", "unknown", "wrong"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What is to be said of one dependency; `unknown` where it could not be told, which is no fault."""

    dependency: str
    verdict: Verdict
    sentence: str


class Unanswered(Exception):  # noqa: N818  a state, not a mistake
    """A dependency did not do what was asked; says so in a sentence."""


async def examine(settings: Settings, *, clock: Callable[[], float] = time.time) -> list[Finding]:
    """Ask everything that the settings name, all at once, each for 5 seconds at most. `clock` gives Unix seconds."""
    asked: list[tuple[str, Callable[[], Awaitable[list[Finding]]]]] = [("agent", partial(_agent, settings, clock))]
    if settings.database_url is not None:
        asked.append(("database", partial(_database, settings.database_url.get_secret_value())))
    if settings.redis_url is not None:
        asked.append(("redis", partial(_redis, settings.redis_url.get_secret_value())))
    fetched = (issuer for issuer in settings.token_issuers() if issuer.url is not None)
    asked += ((f"issuer {issuer.rules.issuer}", partial(_issuer, issuer)) for issuer in fetched)
    if settings.otlp_url is not None:
        asked.append(("traces", partial(_collector, settings.otlp_url)))
    found = await asyncio.gather(*(_patiently(name, ask) for name, ask in asked))
    return [finding for findings in found for finding in findings]


async def _patiently(name: str, ask: Callable[[], Awaitable[list[Finding]]]) -> list[Finding]:
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            return await ask()
    except TimeoutError:
        return [Finding(name, "wrong", f"does not answer within {PATIENCE_SECONDS:g} s")]
    except Unanswered as error:
        return [Finding(name, "wrong", str(error))]


@asynccontextmanager
async def _client(url: str) -> AsyncGenerator[httpx.AsyncClient]:
    """Give a client whose failures are sentences."""
    origin = Origin.of(url) if url.startswith("http+unix:") else None
    wire = httpx.AsyncHTTPTransport(uds=origin.path, trust_env=False) if origin is not None else None
    base = f"http://{origin.authority}" if origin is not None else url
    try:
        async with httpx.AsyncClient(
            base_url=base, transport=wire, trust_env=False, timeout=PATIENCE_SECONDS
        ) as client:
            yield client
    except httpx.ConnectError as error:
        why = "its name leads nowhere" if origin is None else "this user may not connect there"
        raise Unanswered(f"nobody listens at {url}, or {why}") from error
    except httpx.HTTPError as error:
        raise Unanswered(f"does not speak HTTP as expected at {url}: {type(error).__name__}") from error


async def _agent(settings: Settings, clock: Callable[[], float]) -> list[Finding]:
    """Ask the sidecar: is it one, is it guarded, does it trust us, which routes has it, what time is it there."""
    found: list[Finding] = []

    def say(verdict: Verdict, sentence: str, *, about: str = "agent") -> None:
        found.append(Finding(about, verdict, sentence))

    async with _client(settings.agent_url) as client:
        ping = await client.get("/ping")
        if ping.status_code != httpx.codes.OK or _object(ping).get("data") != "pong":
            raise Unanswered(
                f"what listens at {settings.agent_url} is no AgentFlow server: /ping gave {ping.status_code}"
            )
        successor = (await client.get("/health/ready")).status_code != httpx.codes.NOT_FOUND
        kind = "10xgraph-api, the successor" if successor else "10xscale-agentflow-cli"
        say("ok", f"answers at {settings.agent_url}; its routes are those of {kind}")
        _tell_clock(ping, clock(), say)

        stranger = await client.get("/v1/threads", params={"limit": 1})
        if stranger.status_code in (401, 403):
            say("ok", "lets in nobody without a token", about="agent authentication")
        else:
            sentence = 'asks nobody for a token: set "auth": "jwt" in its agentflow.json and JWT_SECRET_KEY'
            say("wrong", sentence, about="agent authentication")
        ours = await client.get("/v1/threads", params={"limit": 1}, headers=_identity(settings, clock))
        if ours.status_code in (401, 403):
            sentence = (
                "refuses our token: JWT_SECRET_KEY, JWT_ISSUER or JWT_AUDIENCE there is not what PROXY_AGENT_… says"
            )
            say("wrong", sentence, about="agent trust")
        elif ours.is_success:
            say("ok", "takes our token, and lists threads", about="agent trust")
        else:
            sentence = f"fails to list threads with status {ours.status_code}: its store is down, or was never set up"
            say("wrong", sentence, about="agent trust")
        _tell_routes(await client.get("/openapi.json"), say)
    return found


def _identity(settings: Settings, clock: Callable[[], float]) -> dict[str, str]:
    identity = InternalIdentity(
        settings.agent_secret.get_secret_value(),
        issuer=settings.agent_issuer,
        audience=settings.agent_audience,
        clock=clock,
    )
    nobody = Principal("check", "check", "check", frozenset(), CredentialKind.API_KEY)
    return {"authorization": f"Bearer {identity.token(nobody).decode()}"}


def _tell_clock(answer: httpx.Response, now: float, say: Callable[..., None]) -> None:
    try:
        theirs = parsedate_to_datetime(answer.headers["date"]).timestamp()
    except (KeyError, ValueError):
        say("unknown", "sends no Date", about="agent clock")
        return
    apart = theirs + 0.5 - now  # a Date has whole seconds
    if abs(apart) > SKEW_SECONDS:
        word = "ahead of" if apart > 0 else "behind"
        say(
            "wrong",
            f"is {abs(apart):.0f} s {word} this machine's; tokens are refused when they differ",
            about="agent clock",
        )
    else:
        say("ok", "agrees with this machine's", about="agent clock")


def _tell_routes(answer: httpx.Response, say: Callable[..., None]) -> None:
    if answer.status_code == httpx.codes.NOT_FOUND:
        say("unknown", "are not published, as in production", about="agent routes")
        return
    paths = _object(answer).get("paths")
    methods = {
        (path, name.upper()) for path, item in (paths if isinstance(paths, dict) else {}).items() for name in item
    }
    told = [row for row in OPERATIONS if row.kind is not Kind.DUPLEX]  # OpenAPI has no WebSockets
    missing = sorted({f"{row.method} {row.upstream}" for row in told if (row.upstream, row.method) not in methods})
    known = {(row.upstream, row.method) for row in OPERATIONS} | {(path, method) for method, path in NOT_EXPOSED}
    strange = sorted(
        f"{method} {path}"
        for path, method in methods - known
        if not path.startswith((*NOT_EXPOSED_PREFIXES, *_OPERATORS_OWN))
    )
    if missing:
        say("wrong", f"lack what the proxy forwards to: {', '.join(missing)}", about="agent routes")
    elif strange:
        named = ", ".join(strange[:10])
        say("unknown", f"have some that this version does not know, and does not expose: {named}", about="agent routes")
    else:
        say("ok", "are those that this version knows", about="agent routes")


def _object(answer: httpx.Response) -> dict[str, Any]:
    try:
        value = answer.json()
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


async def _database(url: str) -> list[Finding]:
    store = SqlKeyStore(url)
    try:
        migrated = await store.is_migrated()
    except KeyStoreDown as problem:
        raise Unanswered(f"does not answer: {problem.reason}") from problem
    finally:
        await store.close()
    if not migrated:
        raise Unanswered("has another version's schema, or none; run: agentflow-proxy migrate")
    return [Finding("database", "ok", "answers, and its schema is this version's")]


async def _redis(url: str) -> list[Finding]:
    client = connect(url)
    try:
        await client.ping()
    except FAULTS as error:
        raise Unanswered(f"does not answer: {reason_of(error)}") from error
    finally:
        await client.aclose()
    return [Finding("redis", "ok", "answers")]


async def _issuer(issuer: Issuer) -> list[Finding]:
    keys = RemoteKeys(issuer, Fetcher(PATIENCE_SECONDS))
    try:
        found = await keys.fetch()
    except (DocumentError, ValueError) as error:
        raise Unanswered(f"its keys cannot be fetched: {error}") from error
    return [Finding(f"issuer {issuer.rules.issuer}", "ok", f"publishes {len(found)} usable keys")]


async def _collector(url: str) -> list[Finding]:
    async with _client(url) as client:
        answer = await client.post("/v1/traces", content=b"", headers={"content-type": "application/x-protobuf"})
    if answer.is_success:
        return [Finding("traces", "ok", f"{url} takes them")]
    return [Finding("traces", "wrong", f"{url}/v1/traces gave status {answer.status_code}")]
