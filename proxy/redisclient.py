"""Scripts run on Redis or Valkey: what waits goes out together, one batch at a time, each within a deadline.

Knows no quota. Whatever goes wrong is RedisDown; nothing is tried twice.
"""

import asyncio
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Final
from urllib.parse import parse_qsl, unquote, urlsplit

import redis.asyncio as redis
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError, ResponseError

from proxy.outages import RedisDown

MOST_AT_ONCE: Final = 200
CONNECT_SECONDS: Final = 1.0
_ONE_MORE_TURN: Final = 0.001
FORMS: Final = "redis://, rediss://, unix://, redis+sentinel://host:port,…/service or redis+cluster://host:port,…"


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

    Raises ValueError for a URL that is none of FORMS.
    """
    parts = urlsplit(url)
    options: dict[str, Any] = {"socket_connect_timeout": CONNECT_SECONDS, "socket_timeout": timeout}
    options |= {"retry": Retry(NoBackoff(), 0), "decode_responses": True, "protocol": 2}
    if parts.scheme in ("redis", "rediss", "unix"):
        return redis.Redis.from_url(url, **options, max_connections=4)
    scheme, _, kind = parts.scheme.partition("+")
    if scheme not in ("redis", "rediss") or kind not in ("sentinel", "cluster"):
        raise ValueError(f"must be {FORMS}")
    names, _, hosts = parts.netloc.rpartition("@")
    user, _, password = names.partition(":")
    known = {"username": unquote(user) or None, "password": unquote(password) or None}
    options |= {name: value for name, value in known.items() if value} | {"ssl": scheme == "rediss"}
    query = dict(parse_qsl(parts.query))
    places = [_place(host) for host in hosts.split(",")]
    if kind == "cluster":
        nodes = [ClusterNode(host, port) for host, port in places]
        return RedisCluster(startup_nodes=nodes, **{**options, "retry": Retry(NoBackoff(), 1)})
    service, _, database = parts.path.strip("/").partition("/")
    if not service or not (database or "0").isdigit():
        raise ValueError("must name the service, as in redis+sentinel://host:26379/service")
    watchers = {"socket_connect_timeout": CONNECT_SECONDS, "socket_timeout": CONNECT_SECONDS}
    if "sentinel_password" in query:
        watchers |= {"password": query["sentinel_password"]}  # type: ignore[dict-item]  # text among numbers
    sentinel = Sentinel(  # type: ignore[no-untyped-call]  # so it is
        places, sentinel_kwargs=watchers, **options, db=int(database or 0)
    )
    client: redis.Redis = sentinel.master_for(service, max_connections=4)
    return client


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

    def forget_time(self) -> None:
        """Learn the server's clock anew: it may have been set, or the server be another."""
        self._ahead = None

    async def run(self, script: Script, keys: Sequence[str], arguments: Sequence[str | int]) -> str:
        """Run a script, and give its answer. Raises RedisDown."""
        call = _Call(script, keys, arguments, asyncio.get_running_loop().create_future())
        self._waiting.append(call)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._deliver())
        return await call.answer

    async def reach(self) -> None:
        """Have a connection, which may take longer than a decision has. Raises RedisDown."""
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await self._client.execute_command("EXISTS", "probe")
        except (RedisError, OSError, TimeoutError) as error:
            raise RedisDown(reason_of(error)) from error

    async def delete(self, keys: Sequence[str]) -> int:
        """Forget keys; give how many there were. Raises RedisDown."""
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                return sum([int(await self._client.delete(key)) for key in keys])
        except (RedisError, OSError, TimeoutError) as error:
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
            except (RedisError, OSError, TimeoutError) as error:
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
        if isinstance(self._client, RedisCluster):
            sent = (self._client.execute_command(*command) for command in commands)
            return await asyncio.gather(*sent, return_exceptions=True)
        if len(commands) == 1:
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
