"""Serving the app: uvicorn with our signals and our drain.

Knows nothing of requests; ends with status 0 after SIGTERM or SIGINT, answers finished or their grace over.
"""

import asyncio
import gc
import importlib
import logging
import signal
import socket
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from functools import partial
from typing import Final, override

import uvicorn

from proxy.app import create_app, make_pool
from proxy.auditfile import configure_audit
from proxy.environment import SettingsError
from proxy.logs import set_level
from proxy.model import LAST_SECONDS, Lifecycle
from proxy.outages import KeyStoreDown
from proxy.partings import Leaving
from proxy.protocol import Conversation, OneAtATime
from proxy.reload import Reload
from proxy.settings import MIGRATE_FIRST, Settings
from proxy.telemetry import Share, begin_telemetry
from proxy.upstream import Pool

log: Final = logging.getLogger("agentflow_proxy.server")
_LINGER_TICKS: Final = 300
"""A client may take the rest of an ended answer for 30 to 60 s; uvicorn ticks ten times a second."""
KEEP_ALIVE_SECONDS: Final = 75
"""Longer than nginx keeps its idle connections to us, so that it never writes into one we just closed."""
SETTLE_SECONDS: Final = 0.25, 1.0
"""For requests that were on their way when the port closed to arrive: at least, and at most for one that does not."""


class Server(uvicorn.Server):
    """uvicorn's server: it drains on the first signal, and tells when it listens."""

    def __init__(
        self,
        config: uvicorn.Config,
        *,
        lifecycle: Lifecycle,
        background: Callable[[], AbstractAsyncContextManager[None]],
        pool: Pool,
        drain_delay: float,
        started: Callable[[], None] | None = None,
        reload: Callable[[], None] | None = None,
        metrics: str | None = None,
    ) -> None:
        super().__init__(config)
        self._reload = reload
        self._metrics = metrics
        self._background = background
        self._pool = pool
        self._drain_delay = drain_delay
        self._lifecycle = lifecycle
        self._started = started
        self._listeners: Sequence[socket.socket] = ()
        self._tasks: set[asyncio.Task[None]] = set()

    @contextmanager
    @override
    def capture_signals(self) -> Generator[None]:
        # uvicorn would raise the signal once more at the end, and the process would not end with 0.
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.drain)
        if self._reload is not None:
            loop.add_signal_handler(signal.SIGHUP, self._reload)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                loop.remove_signal_handler(number)

    @override
    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        async with self._background():
            await super().serve(sockets)

    def drain(self) -> None:
        """Turn unready; after the delay, take no new connection; then stop when what runs is done.

        Until the port is closed everything is served, each answer with `Connection: close`: whoever keeps
        connections to us learns to go elsewhere, and meets none that is just being closed. Asked again, stop at once.
        """
        self.force_exit = not self._lifecycle.ready
        self._lifecycle.ready = False
        loop = asyncio.get_running_loop()
        if self.force_exit:
            self._lifecycle.ends_at = loop.time() + LAST_SECONDS
            self._stop()
        else:
            for connection in list(self.server_state.connections):
                if isinstance(connection, OneAtATime):
                    connection.announce_close()
            self.config.encoded_headers.append((b"connection", b"close"))
            self.server_state.default_headers = [*self.server_state.default_headers, (b"connection", b"close")]
            loop.call_later(self._drain_delay, self._close)
        log.info("server.draining", extra={"fields": {"at_once": self.force_exit}})

    def _close(self) -> None:
        """Close the port, once everybody who has already connected is let in: the system would reset them."""
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + (self.config.timeout_graceful_shutdown or 0) + LAST_SECONDS
        self._lifecycle.ends_at = min(self._lifecycle.ends_at, ends_at)  # a second signal may have come before
        for listener in self._listeners:
            listener.setblocking(False)
            with suppress(OSError):  # nobody waits, or it is closed already
                while True:
                    connection, _ = listener.accept()
                    self._tasks.add(loop.create_task(self._serve_accepted(connection)))
        for server in self.servers:
            server.close()
        least, most = SETTLE_SECONDS
        loop.call_later(least, self._settle, loop.time() + most)

    def _settle(self, until: float) -> None:
        """Stop as soon as every connection has had its first request, or at loop time `until`."""
        loop = asyncio.get_running_loop()
        expecting = (getattr(connection, "cycle", connection) is None for connection in self.server_state.connections)
        if any(expecting) and loop.time() < until:
            loop.call_later(0.02, self._settle, until)
        else:
            self._stop()

    async def _serve_accepted(self, connection: socket.socket) -> None:
        def protocol() -> asyncio.Protocol:
            kind = self.config.http_protocol_class
            return kind(config=self.config, server_state=self.server_state, app_state={})  # type: ignore[call-arg]

        connection.setblocking(False)
        await asyncio.get_running_loop().connect_accepted_socket(protocol, connection)

    def _stop(self) -> None:
        """Close idle connections at once: uvicorn does so up to 0.1 s later, and would refuse who asks meanwhile."""
        self.should_exit = True
        for connection in list(self.server_state.connections):
            if isinstance(connection, OneAtATime):
                connection.close_idle()

    @override
    async def on_tick(self, counter: int) -> bool:
        if counter % _LINGER_TICKS == 0:
            for connection in list(self.server_state.connections):
                if isinstance(connection, Leaving):
                    connection.give_up_closing()
        return await super().on_tick(counter)

    @override
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._lifecycle.draining = True
        await super().shutdown(sockets)
        self._pool.close()
        await asyncio.sleep(0)  # a transport closes in the loop's next turn

    @override
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # What is here now stays: not to look through it at each collection saves 6 % of an invoke.
        gc.collect()
        gc.freeze()
        self._listeners = sockets or ()
        if self._started is not None and not self.should_exit:
            self._started()
        listening = [listener.getsockname()[:2] for server in self.servers for listener in server.sockets]
        fields: dict[str, object] = {"listening": [f"{host}:{port}" for host, port in listening]}
        if self._metrics is not None:
            fields["metrics"] = self._metrics
        log.info("server.started", extra={"fields": fields})


def listen(host: str, port: int) -> socket.socket:
    """Bind a listening socket; port 0 is a free one. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=2048)


def require_schema(url: str) -> None:
    """Raise SettingsError unless the key store at `url` answers and has the schema that this version reads."""
    from proxy.keystore import SqlKeyStore  # noqa: PLC0415  only where there is a database: SQLAlchemy is 50 MiB

    async def ask() -> bool:
        store = SqlKeyStore(url)
        try:
            return await store.is_migrated()
        finally:
            await store.close()

    try:
        migrated = asyncio.run(ask())
    except ValueError as error:
        raise SettingsError([f"PROXY_DATABASE_URL: {error}"]) from error
    except KeyStoreDown as problem:
        raise SettingsError([f"PROXY_DATABASE_URL: the database does not answer: {problem.reason}"]) from problem
    if not migrated:
        raise SettingsError([MIGRATE_FIRST])


def import_early(settings: Settings) -> None:
    """Import now what these settings ask for: a supervisor's workers share the memory of what it has imported."""
    asked = ("keystore", settings.database_url), ("redistier", settings.redis_url), ("traces", settings.otlp_url)
    for name, setting in (*asked, ("exposition", settings.metrics_port)):
        if setting is not None:
            importlib.import_module(f"proxy.{name}")


def build(
    settings: Settings,
    *,
    started: Callable[[], None] | None = None,
    environment: Mapping[str, str] | None = None,
    share: Share | None = None,
) -> Server:
    """Build the server for `settings`. Raises SettingsError for what can only be known by trying.

    With the `environment` that the settings come from, SIGHUP reads it again.
    `share` is what one of several workers has in common with the others, where there are metrics.
    """
    configure_audit(settings.audit_file, background=True)
    if settings.database_url is not None:
        require_schema(settings.database_url.get_secret_value())
    lifecycle = Lifecycle()
    pool = make_pool(settings)
    try:
        telemetry = begin_telemetry(settings, share)
    except OSError as error:
        address = f"{settings.metrics_host}:{settings.metrics_port}"
        fault = f"PROXY_METRICS_HOST, PROXY_METRICS_PORT: {address} cannot be used: {error.strerror}"
        raise SettingsError([fault]) from error
    app = create_app(settings, upstream=pool, lifecycle=lifecycle, telemetry=telemetry)
    reload = None
    if environment is not None:
        limits, keys = app.state.limits, app.state.keys
        reload = Reload(settings, environment, limits=limits, keys=keys, set_level=set_level)
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http=partial(OneAtATime, note_refusal=app.state.note_refusal),  # type: ignore[arg-type]  # called, never looked into
        ws=Conversation,
        ws_max_size=settings.max_body_bytes,
        ws_per_message_deflate=False,  # a bomb to unpack, and 64 KiB of window for each connection
        lifespan="off",
        access_log=False,
        log_config=None,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=settings.grace_seconds,
    )
    return Server(
        config,
        lifecycle=lifecycle,
        background=app.state.background,
        pool=pool,
        drain_delay=settings.drain_delay_seconds,
        started=started,
        reload=reload,
        metrics=telemetry.server.address if telemetry.server is not None else None,
    )
