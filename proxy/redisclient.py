"""Scripts run on Redis or Valkey: what waits goes out together, one batch at a time, each within a deadline.

Knows no quota. Whatever goes wrong is RedisDown; nothing is tried twice.
"""

import asyncio
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Final
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

import redis.asyncio as redis
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisClusterException, RedisError, ResponseError

from proxy.outages import RedisDown

MOST_AT_ONCE: Final = 200
CONNECT_SECONDS: Final = 1.0
FAULTS: Final = (RedisError, RedisClusterException, OSError, TimeoutError)
"""What goes wrong with Redis. A cluster that cannot be found is none of the library's own errors."""
_ONE_MORE_TURN: Final = 0.001
FORMS: Final = "redis://, rediss://, unix://, redis+sentinel://host:port,…/service or redis+cluster://host:port,…"
_TLS_FILES: Final = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_PROBES: Final = 1_000


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script of ours, and the name that Redis knows it by."""

    text: str
    digest: str


def read_script(name: str) -> Script:
    """Read one of the scripts that come with this package."""
    text = (files("proxy") / "scripts" / f"{name}.lua").read_text(encoding="utf-8")
    return Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


def connect(url: str, *, timeout: float = CONNECT_SECONDS) -> redis.Redis | RedisCluster:
    """Make a client that waits at most `timeout` seconds for an answer; it connects when it is first used.

    Raises ValueError for a URL that is none of FORMS, or whose query has what nobody reads.
    """
    parts = urlsplit(url)
    scheme, _, kind = parts.scheme.partition("+")
    if parts.scheme != "unix" and (scheme not in ("redis", "rediss") or kind not in ("", "sentinel", "cluster")):
        raise ValueError(f"must be {FORMS}")
    query = _query(parts, scheme, kind)
    tls = {name: value for name, value in query.items() if name.startswith("ssl_")}
    options: dict[str, Any] = {"socket_connect_timeout": CONNECT_SECONDS, "socket_timeout": timeout}
    options |= {"retry": Retry(NoBackoff(), 0), "decode_responses": True, "protocol": 2}
    if not kind:
        return redis.Redis.from_url(url, **options, max_connections=4)
    names, _, hosts = parts.netloc.rpartition("@")
    user, _, password = names.partition(":")
    known = {"username": unquote(user) or None, "password": unquote(password) or None}
    secured: dict[str, Any] = {"ssl": scheme == "rediss", **tls}
    options |= {name: value for name, value in known.items() if value} | secured
    places = [_place(host) for host in hosts.split(",")]
    if kind == "cluster":
        return RedisCluster(startup_nodes=[ClusterNode(host, port) for host, port in places], **options)
    service, _, database = parts.path.strip("/").partition("/")
    if not service or not (database or "0").isdigit():
        raise ValueError("must name the service, as in redis+sentinel://host:26379/service")
    watchers = {name: options[name] for name in ("socket_connect_timeout", "retry")} | secured
    watchers["socket_timeout"] = CONNECT_SECONDS
    if "sentinel_password" in query:
        watchers["password"] = query["sentinel_password"]
    sentinel = Sentinel(  # type: ignore[no-untyped-call]  # so it is
        places, sentinel_kwargs=watchers, **options, db=int(database or 0)
    )
    client: redis.Redis = sentinel.master_for(service, max_connections=4)
    return client


def _query(parts: SplitResult, scheme: str, kind: str) -> dict[str, Any]:
    """Read what a URL says after `?`; what the library would stumble over at the first decision is told now."""
    query: dict[str, Any] = dict(parse_qsl(parts.query, keep_blank_values=True))
    names = {"": ["db"], "sentinel": ["sentinel_password"], "cluster": []}[kind]
    names += ["username", "password"] if scheme == "unix" else []
    names += [*_TLS_FILES, "ssl_check_hostname"] if scheme == "rediss" else []
    unread = sorted(query.keys() - set(names))
    if unread:
        raise ValueError(f"has {unread[0]} in its query, where it may have {', '.join(names) or 'nothing'}")
    for name in _TLS_FILES:
        if name in query and not Path(query[name]).is_file():
            raise ValueError(f"must name a file that is there as {name}")
    if query.get("ssl_check_hostname", "true") not in ("true", "false"):
        raise ValueError("must have true or false as ssl_check_hostname")
    if "ssl_check_hostname" in query:
        query["ssl_check_hostname"] = query["ssl_check_hostname"] == "true"
    if not query.get("db", "0").isdigit():
        raise ValueError("must have a number as db")
    return query


def _place(host: str) -> tuple[str, int]:
    name, _, port = host.rpartition(":")
    if not name or not port.isdigit():
        raise ValueError("must name each host with its port")
    return name.strip("[]"), int(port)


@dataclass(slots=True)
class _Call:
    script: Script
    keys: Sequence[str]
    arguments: Sequence[str | int]
    answer: asyncio.Future[str]


class Courier:
    """Takes scripts to Redis. Whoever asks while a batch is under way goes with the next one.

    Each batch has `timeout` seconds; when one fails, whoever waits fails with it. `ticks` is a monotonic clock.
    """

    def __init__(self, url: str, *, timeout: float, ticks: Callable[[], float] = time.monotonic) -> None:
        self._client = connect(url, timeout=timeout + CONNECT_SECONDS)  # ours runs out first
        self._reach_seconds = CONNECT_SECONDS * (2 + url.count(",") if "+" in urlsplit(url).scheme else 1)
        self._timeout = timeout
        self._ticks = ticks
        self._waiting: list[_Call] = []
        self._task: asyncio.Task[None] | None = None
        self._ahead: float | None = None
        self.failures = 0
        """Batches in which something failed, since the last in which nothing did."""

    @property
    def is_cluster(self) -> bool:
        """Whether keys of one script must be in one slot."""
        return isinstance(self._client, RedisCluster)

    @property
    def not_after(self) -> int:
        """Give the time, on the server's clock in microseconds, after which nobody waits for a call made now.

        0 while that clock is not known.
        """
        return int((self._ticks() + self._ahead + 2 * self._timeout) * 1_000_000) if self._ahead is not None else 0

    def note_time(self, now: int) -> None:
        """Learn the server's clock from an answer: microseconds."""
        self._ahead = now / 1_000_000 - self._ticks()

    async def run(self, script: Script, keys: Sequence[str], arguments: Sequence[str | int]) -> str:
        """Run a script, and give its answer. Raises RedisDown, also when Redis says that it came too late to count."""
        call = _Call(script, keys, arguments, asyncio.get_running_loop().create_future())
        self._waiting.append(call)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._deliver())
        answer = await call.answer
        if answer == "late":
            self._ahead = None  # the server's clock may have been set, or the server be another
            raise RedisDown("late")
        return answer

    async def reach(self) -> None:
        """Have a connection, which may take longer than a decision has. Raises RedisDown.

        Of several hosts the first may be the one that is silent: there is time to ask the others too.
        """
        try:
            async with asyncio.timeout(self._reach_seconds):
                await self._client.execute_command("EXISTS", "probe")
        except FAULTS as error:
            raise RedisDown(reason_of(error)) from error

    def probes(self, prefix: str) -> list[str]:
        """Give keys that begin so, one on each master: all of them must do their work. Only once there is a connection.

        Raises RedisDown where nobody has a key's slot.
        """
        if not isinstance(self._client, RedisCluster):
            return [f"{prefix}{{probe}}"]
        masters, found = len(self._client.get_primaries()), dict[str, str]()
        for number in range(_PROBES):
            key = f"{prefix}{{probe{number}}}"
            node = self._client.get_node_from_key(key)
            if node is None:
                raise RedisDown("slot without a master")
            found.setdefault(node.name, key)
            if len(found) == masters:
                break
        return list(found.values())

    async def delete(self, keys: Sequence[str]) -> int:
        """Forget keys; give how many there were. Raises RedisDown."""
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                return sum([int(await self._client.delete(key)) for key in keys])
        except FAULTS as error:
            raise RedisDown(reason_of(error)) from error

    async def disconnect(self) -> None:
        """Drop the connections, so that the next are made to whoever is the server then."""
        if isinstance(self._client, RedisCluster):
            await self._client.aclose()
        else:
            await self._client.connection_pool.disconnect()

    async def close(self) -> None:
        """End."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._client.aclose()

    async def _deliver(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[:MOST_AT_ONCE], self._waiting[MOST_AT_ONCE:]
            try:
                answers = await self._within_deadline(batch)
            except Exception as error:  # noqa: BLE001  or else who waits would be cancelled, as if the process ended
                self.failures += 1
                failed, self._waiting = batch + self._waiting, []
                for call in failed:
                    _settle(call, error)
            except BaseException:
                for call in batch + self._waiting:
                    call.answer.cancel()
                raise
            else:
                is_whole = not any(isinstance(answer, BaseException) for answer in answers)
                self.failures = 0 if is_whole else self.failures + 1
                for call, answer in zip(batch, answers, strict=True):
                    _settle(call, answer)

    async def _within_deadline(self, batch: list[_Call]) -> list[Any]:
        # uvloop runs timers before it reads sockets: a loop that was held up looks once more before it gives up.
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(None) as deadline:
            timer = loop.call_later(self._timeout, lambda: deadline.reschedule(loop.time() + _ONE_MORE_TURN))
            try:
                answers = await self._send(batch)
                unknown = {call.script.digest: call.script for call, answer in zip(batch, answers, strict=True)
                           if isinstance(answer, NoScriptError)}  # fmt: skip
                if unknown:
                    for script in unknown.values():
                        await self._client.script_load(script.text)
                    again = [at for at, answer in enumerate(answers) if isinstance(answer, NoScriptError)]
                    for at, answer in zip(again, await self._send([batch[at] for at in again]), strict=True):
                        answers[at] = answer
                return answers
            finally:
                timer.cancel()

    async def _send(self, batch: list[_Call]) -> list[Any]:
        commands = [("EVALSHA", call.script.digest, len(call.keys), *call.keys, *call.arguments) for call in batch]
        if len(commands) == 1 and isinstance(self._client, redis.Redis):
            try:
                return [await self._client.execute_command(*commands[0])]  # type: ignore[no-untyped-call]  # so it is
            except NoScriptError as error:
                return [error]
        pipeline = self._client.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        return await pipeline.execute(raise_on_error=False)


def _settle(call: _Call, answer: object) -> None:
    if call.answer.done():
        return
    if isinstance(answer, BaseException):
        call.answer.set_exception(RedisDown(reason_of(answer), answered=isinstance(answer, ResponseError)))
    else:
        call.answer.set_result(str(answer))


def reason_of(error: BaseException) -> str:
    """Say what went wrong, for the log: the error's type, and Redis's own word for it, which holds no caller's text."""
    word = str(error).split(" ", 1)[0]
    return f"{type(error).__name__} {word}" if word.isupper() else type(error).__name__
