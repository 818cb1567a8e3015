"""Many callers at once, on sockets of their own: what each was answered, and nothing else of it.

Waits for answers, never for a time; who leaves early closes the connection.
"""

import asyncio
from collections import Counter
from collections.abc import Iterable, Sequence
from urllib.parse import urlsplit


def invoke(token: str, text: str = "hi") -> bytes:
    """Write an invoke in the short form."""
    body = b'{"text":"%b"}' % text.encode()
    head = f"POST /agent/invoke HTTP/1.1\r\nHost: proxy.test\r\nAuthorization: Bearer {token}\r\n"
    return head.encode() + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body


async def ask(url: str, requests: Iterable[bytes], *, leave_after: float | None = None) -> list[int]:
    """Send requests one after the other on one connection; give the status of each answer.

    With `leave_after` (seconds) hang up then, whether there was an answer or not.
    """
    parts = urlsplit(url)
    statuses: list[int] = []
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        async with asyncio.timeout(leave_after):
            for request in requests:
                writer.write(request)
                head = await reader.readuntil(b"\r\n\r\n")
                statuses.append(int(head.split(b" ")[1]))
                lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
                await reader.readexactly(int(lengths[0].split(b":")[1]))
    except (TimeoutError, asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.transport.abort()
    return statuses


async def ask_at_once(urls: Sequence[str], request: bytes, *, callers: int, each: int) -> Counter[int]:
    """Let `callers` connections, spread over the proxies, send `each` requests; count the statuses."""
    lines = [ask(urls[number % len(urls)], [request] * each) for number in range(callers)]
    return Counter(status for statuses in await asyncio.gather(*lines) for status in statuses)
