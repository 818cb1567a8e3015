"""The composition root: builds every room from the settings and puts them in order.

Only wiring; decides nothing, and does no work at import.
"""

import hmac
import os
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.middleware.asyncexitstack import AsyncExitStackMiddleware
from starlette.routing import Route

from proxy.accesslog import AccessLog
from proxy.admission import Limits, limits_of
from proxy.application import Proxy, show_page
from proxy.audit import Audit
from proxy.authentication import Authentication, Authenticator
from proxy.background import background
from proxy.duplex import Duplex, DuplexRules
from proxy.failures import Failures
from proxy.filing import Filing
from proxy.issuers import Issuer
from proxy.keycache import KeyCache
from proxy.metrics import Reading
from proxy.model import Lifecycle, Upstream
from proxy.observability import Observability
from proxy.overload import Overload
from proxy.places import Places
from proxy.publickeys import KeySource, KnownKeys
from proxy.relay import Relay
from proxy.revocations import RevocationFile
from proxy.routes import BodyRules, CanonicalPaths, Live, Phases, Ready, health_routes, routes
from proxy.runs import STOPS_AT_ONCE, Runs
from proxy.settings import Settings
from proxy.telemetry import Telemetry, connection_readings, limit_readings
from proxy.tenancy import RunRules, tag_of
from proxy.tokens import InternalIdentity, TokenVerifier
from proxy.uploads import UploadRules, Uploads
from proxy.upstream import Pool

if TYPE_CHECKING:
    from proxy.keystore import SqlKeyStore


def create_app(
    settings: Settings,
    *,
    upstream: Upstream | None = None,
    lifecycle: Lifecycle | None = None,
    clock: Callable[[], float] = time.time,
    telemetry: Telemetry | None = None,
) -> FastAPI:
    """Build the proxy. `upstream`, `lifecycle` and `clock` (Unix seconds) are what a test may give instead.

    Runs are stopped on connections of their own to the setting's sidecar, whatever `upstream` is.

    `telemetry` watches it, where somebody wants to see more than the access line.
    """
    lifecycle = lifecycle or Lifecycle()
    telemetry = telemetry or Telemetry()
    upstream = upstream or make_pool(settings)
    store = _store(settings)
    keys = KeyCache(store, pinned=settings.api_keys, grace=settings.key_store_grace_seconds, clock=clock)
    shown = settings.docs
    app = Proxy(
        title="agentflow-proxy",
        docs_url=None,  # FastAPI's page loads its scripts from somebody else's host
        openapi_url="/openapi.json" if shown else None,
        redoc_url=None,
        redirect_slashes=False,
    )
    overload = Overload(settings.thresholds())
    secret = settings.secret_of_tags()
    limits = limits_of(settings, partition_of=lambda name: tag_of(name, secret), clock=clock)
    runs = Runs(_pool_of_stops(settings), settings.flow_rules(), overload.note_end)
    relay = Relay(upstream, runs, settings.flow_rules())
    operations = routes(_phases(settings, limits, relay, clock, overload))
    ready = Ready(lifecycle, lacks=lambda: _lack(settings, keys) or limits.lack)
    app.router.routes += [*health_routes(Live(), ready), *operations]
    if shown:
        app.router.routes.append(Route("/docs", show_page, include_in_schema=False))
    # Outermost first. FastAPI's own error middleware would answer before ours; its stack ends here.
    inner = CanonicalPaths(AsyncExitStackMiddleware(app.router), operations)
    door = Authentication(
        inner,
        authenticator=Authenticator(tokens=_verifier(settings, clock), keys=keys, clock=clock),
        failures=Failures(settings.failure_rates()),
        lifecycle=lifecycle,
        audit=Audit(),
    )
    observability = Observability(
        door,
        clock=time.perf_counter,
        new_id=_new_name,
        trusted_hops=settings.trusted_hops,
        watchers=[AccessLog(), *telemetry.watchers],
    )
    app.middleware_stack = observability
    app.state.note_refusal = observability.note_refusal
    if telemetry.metrics is not None:
        telemetry.metrics.sources.append(lambda: _readings(lifecycle, keys, upstream, limits))
    app.state.background = lambda: background(settings, lifecycle, keys, store, limits, overload, runs, telemetry)
    app.state.limits, app.state.keys = limits, keys
    return app


def _readings(lifecycle: Lifecycle, keys: KeyCache, upstream: Upstream, limits: object) -> Iterable[Reading]:
    """Give the metrics that nobody counts."""
    yield "ready", (), lifecycle.ready
    yield "key_store_up", (), not keys.is_down
    yield from connection_readings(upstream)
    yield from limit_readings(limits)


def _store(settings: Settings) -> "SqlKeyStore | None":
    """Make the store of keys, where there is one."""
    if settings.database_url is None:
        return None
    from proxy.keystore import SqlKeyStore  # noqa: PLC0415  what is not asked for is not imported: it is 50 MiB

    return SqlKeyStore(settings.database_url.get_secret_value())


def _lack(settings: Settings, keys: KeyCache) -> str:
    """Name what is down when nobody at all could be let in; empty while somebody can."""
    others = settings.jwt_secret is not None or settings.issuers_file or settings.api_keys
    return "key_store_down" if keys.is_lost and not others else ""


def _phases(settings: Settings, limits: Limits, relay: Relay, clock: Callable[[], float], overload: Overload) -> Phases:
    identity = InternalIdentity(
        settings.agent_secret.get_secret_value(),
        issuer=settings.agent_issuer,
        audience=settings.agent_audience,
        clock=clock,
    )
    secret = settings.secret_of_tags()
    file_secret = hmac.digest(secret, b"agentflow-proxy/file-handle", "sha256")
    filing = Filing(relay, _uploads(settings), identity, file_secret, settings.query_deadlines())
    run_rules = RunRules(
        allow_system=settings.allow_system_messages,
        max_recursion=settings.max_recursion_limit,
        standing_thread=settings.default_thread == "standing",
        allow_client_tools=settings.allow_client_tools,
        file_secret=file_secret,
    )
    duplex = Duplex(
        settings.agent_url,
        _duplex_rules(settings),
        identity=identity,
        limits=limits,
        runs=relay.runs,
        overload=overload,
        places=Places(settings.websockets_at_once, settings.websockets_per_caller, "websockets"),
        run_rules=run_rules,
        flow_rules=settings.flow_rules(),
        thread_secret=secret,
        new_name=_new_name,
    )
    return Phases(
        overload=overload,
        limits=limits,
        relay=relay,
        identity=identity,
        thread_secret=secret,
        new_name=_new_name,
        run_rules=run_rules,
        body_rules=BodyRules(settings.max_body_bytes, settings.body_timeout_seconds),
        run_deadlines=settings.run_deadlines(),
        query_deadlines=settings.query_deadlines(),
        others={**filing.phases(), **duplex.phases()},
    )


def _duplex_rules(settings: Settings) -> DuplexRules:
    return DuplexRules(
        connect=settings.connect_timeout_seconds,
        handshake=settings.query_timeout_seconds,
        idle=settings.websocket_idle_seconds,
        total=settings.websocket_total_seconds,
    )


def _new_name() -> str:
    """Choose 128 bits at random, in hex; a UUID would cost eight times as much."""
    return os.urandom(16).hex()


def _uploads(settings: Settings) -> Uploads:
    rules = UploadRules(
        most=settings.max_upload_bytes,
        seconds=settings.upload_timeout_seconds,
        connect=settings.connect_timeout_seconds,
    )
    return Uploads(settings.agent_url, rules, Places(settings.uploads_at_once, settings.uploads_per_caller, "uploads"))


def make_pool(settings: Settings) -> Pool:
    """Make the connections to the sidecar."""
    return Pool(
        settings.agent_url,
        most=settings.pool_connections,
        most_idle=settings.pool_idle_connections,
        idle_seconds=settings.pool_idle_seconds,
    )


def _pool_of_stops(settings: Settings) -> Pool:
    """Make those on which runs are stopped: beside the others, and closed when they are answered."""
    return Pool(settings.agent_url, most=STOPS_AT_ONCE, most_idle=0, idle_seconds=settings.pool_idle_seconds)


def _verifier(settings: Settings, clock: Callable[[], float]) -> TokenVerifier | None:
    issuers = settings.token_issuers()
    if not issuers:
        return None
    path = settings.revocations_file
    revocations = RevocationFile(path, clock=time.monotonic) if path is not None else None
    fetched = _fetched_keys(settings) if any(issuer.url for issuer in issuers) else None

    def keys_of(issuer: Issuer) -> KeySource:
        return KnownKeys(issuer.keys) if fetched is None or issuer.url is None else fetched(issuer)

    return TokenVerifier([(issuer, keys_of(issuer)) for issuer in issuers], clock, revocations)


def _fetched_keys(settings: Settings) -> Callable[[Issuer], KeySource]:
    from proxy.jwks import Fetcher, FetchRules, RemoteKeys  # noqa: PLC0415  as in `_store`

    rules = FetchRules(
        timeout=settings.jwks_timeout_seconds,
        cooldown=settings.jwks_cooldown_seconds,
        fresh=settings.jwks_refresh_seconds,
        stale=settings.jwks_stale_seconds,
    )
    return partial(RemoteKeys, fetch=Fetcher(rules.timeout), rules=rules)
