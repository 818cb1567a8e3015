"""Passing an upload on while it comes: each part goes upstream as it arrives, and no more than a few parts are held.

On a connection of its own, closed afterwards; reads the answer all the while, since it may come before the end.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final, cast

from proxy.answers import Answer
from proxy.errors import BodyTimeout, BodyTooLarge, BodyUnsupported, ClientLeft
from proxy.model import Headers, Receive, UpstreamRequest
from proxy.origin import Origin
from proxy.outages import (
    UpstreamCut,
    UpstreamDeadline,
    UpstreamMalformed,
    UpstreamProblem,
    require_trust,
)
from proxy.places import Places

MAX_ANSWER_BYTES: Final = 16 << 20
_MAX_WAITING_BYTES: Final = 65_536
_READ_BYTES: Final = 65_536


@dataclass(frozen=True, slots=True)
class UploadRules:
    """At most `most` bytes within `seconds`; `connect` seconds for the sidecar to accept."""

    most: int
    seconds: float
    connect: float


@dataclass(slots=True)
class _Progress:
    """How far an upload is; `waits_for_client` says whose turn it is."""

    waits_for_client: bool = True


@dataclass(slots=True)
class Uploads:
    """Sends uploads to the sidecar at `url`, as many at once as there are `places`."""

    url: str
    rules: UploadRules
    places: Places

    async def pass_on(self, request: UpstreamRequest, headers: Headers, receive: Receive, *, caller: str) -> Answer:
        """Send the body that `receive` gives with `request`, and give the whole answer.

        `headers` are the client's. Raises BodyUnsupported, BodyTooLarge (by the announced length already),
        BodyTimeout, ClientLeft, RateExceeded or PoolExhausted (see `places`) or an UpstreamProblem.
        """
        framing, origin = self._framing(headers), Origin.of(self.url)
        with self.places.one(caller):
            async with self._connected(origin) as (reader, writer):
                writer.write(_head(request, origin.authority.encode(), framing))
                chunked = (b"transfer-encoding", b"chunked") in framing
                return await self._exchange(reader, writer, receive, chunked=chunked)

    def _framing(self, headers: Headers) -> Headers:
        """Give the fields that tell the sidecar of the body: its type, and its length or chunks."""
        framing = [_form(headers)]
        announced = [value for name, value in headers if name == b"content-length"]
        if not announced:
            return [*framing, (b"transfer-encoding", b"chunked")]
        if int(announced[0]) > self.rules.most:
            raise BodyTooLarge(self.rules.most)
        return [*framing, (b"content-length", announced[0])]

    @asynccontextmanager
    async def _connected(self, origin: Origin) -> AsyncGenerator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader = asyncio.StreamReader(limit=_READ_BYTES)
        try:
            async with asyncio.timeout(self.rules.connect):
                transport, protocol = await origin.connect(lambda: asyncio.StreamReaderProtocol(reader))
        except TimeoutError as error:
            raise UpstreamDeadline(reason="connect") from error
        except OSError as error:
            raise UpstreamProblem(reason=type(error).__name__) from error
        loop = asyncio.get_running_loop()
        writer = asyncio.StreamWriter(cast("asyncio.WriteTransport", transport), protocol, reader, loop)
        writer.transport.set_write_buffer_limits(high=_MAX_WAITING_BYTES)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    async def _exchange(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, receive: Receive, *, chunked: bool
    ) -> Answer:
        progress = _Progress()
        answering = asyncio.create_task(_read_answer(reader))
        sending = asyncio.create_task(self._send(writer, receive, progress, chunked=chunked))
        tasks = [answering, sending]
        try:
            await asyncio.wait(tasks, timeout=self.rules.seconds, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                return answering.result()
            if not sending.done():
                raise BodyTimeout if progress.waits_for_client else UpstreamDeadline(reason="upload")
            sending.result()
            tasks.append(asyncio.create_task(_leaving(receive)))
            watched = [answering, tasks[-1]]
            await asyncio.wait(watched, timeout=self.rules.seconds, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                return answering.result()
            raise ClientLeft if watched[1].done() else UpstreamDeadline(reason="first byte")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _send(
        self, writer: asyncio.StreamWriter, receive: Receive, progress: _Progress, *, chunked: bool
    ) -> None:
        """Send the body part by part, the next when the last has gone; end early when upstream reads no more."""
        size = 0
        more = True
        try:
            while more:
                progress.waits_for_client = True
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientLeft
                progress.waits_for_client = False
                body = message.get("body", b"")
                more = message.get("more_body", False)
                size += len(body)
                if size > self.rules.most:
                    raise BodyTooLarge(self.rules.most)
                if body:
                    writer.write(b"%x\r\n%b\r\n" % (len(body), body) if chunked else body)
                await writer.drain()
            if chunked:
                writer.write(b"0\r\n\r\n")
                await writer.drain()
        except ConnectionError:
            return  # what it said before it closed is read by the other task, or that is cut


def _form(headers: Headers) -> tuple[bytes, bytes]:
    types = [value for name, value in headers if name == b"content-type"]
    codings = [value for name, value in headers if name == b"content-encoding" and value.lower() != b"identity"]
    if len(types) != 1 or codings or not types[0].lower().startswith(b"multipart/form-data;"):
        raise BodyUnsupported("Send Content-Type: multipart/form-data, without a content coding.")
    return b"content-type", types[0]


def _head(request: UpstreamRequest, authority: bytes, framing: Headers) -> bytes:
    lines = [b"%b %b HTTP/1.1\r\nhost: %b\r\nconnection: close\r\n" % (request.method, request.target, authority)]
    lines += [b"%b: %b\r\n" % each for each in (*request.headers, *framing)]
    return b"".join([*lines, b"\r\n"])


async def _read_answer(reader: asyncio.StreamReader) -> Answer:
    answer = Answer()
    try:
        while not answer.complete:
            data = await reader.read(_READ_BYTES)
            if not data:
                raise UpstreamCut(reason="end of file")
            answer.feed(data)
            if answer.waiting > MAX_ANSWER_BYTES:
                raise UpstreamMalformed(reason="the answer is too long")
    except ConnectionError as error:
        raise UpstreamCut(reason=type(error).__name__) from error
    require_trust(answer.status)
    return answer


async def _leaving(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
