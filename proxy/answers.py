"""Reading one HTTP/1.1 answer, strictly: bytes in, head and body out, and every departure from the rules told.

Pure (RFC 9112 through llhttp): opens nothing, waits for nothing, and never sees a second answer.
"""

from typing import Any, Final

import httptools

from proxy.errors import Problem
from proxy.model import Headers
from proxy.outages import UpstreamMalformed

MAX_HEAD_BYTES: Final = 65_536
_BODYLESS: Final = frozenset({204, 304})
_INFORMATIONAL: Final = 100
_SWITCHING: Final = 101
_FIRST_FINAL: Final = 200
_BEYOND: Final = 600


class Answer:
    """One answer while it is being read. Its public attributes are for reading only."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: Headers = []
        self.begun = False
        """The final head is complete."""
        self.complete = False
        """The body is complete, by its own framing."""
        self.surplus = False
        """Bytes came after the end."""
        self.persistent = False
        """The sender means to keep the connection open."""
        self.waiting = 0
        """Bytes of body not yet taken."""
        self._chunks: list[bytes] = []  # a deque takes 760 bytes of every open stream
        self._head_bytes = 0
        self._named_bytes = 0
        self._parser: Any = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        """Read on. Raises UpstreamMalformed when the bytes are no answer; what came before stays readable."""
        if self.complete:
            self.surplus = True
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserUpgrade, httptools.HttpParserError) as error:
            self._refuse(error)
        if not self.begun:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                raise UpstreamMalformed(reason="the head is too long")

    def _refuse(self, error: Exception) -> None:
        if isinstance(error, httptools.HttpParserUpgrade):
            raise UpstreamMalformed(reason="switched protocols") from error
        if self.complete:
            self.surplus = True
            return
        if isinstance(error.__context__, Problem):  # raised by a callback below
            raise error.__context__ from None
        raise UpstreamMalformed(reason=type(error).__name__) from error

    def take(self) -> bytes:
        """Give the bytes of body read and not yet taken; may be empty."""
        taken = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        self.waiting = 0
        return taken

    # What llhttp calls.

    def on_message_begin(self) -> None:
        if self.complete:
            self.surplus = True
            raise UpstreamMalformed(reason="a second answer")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.begun:
            return  # a trailer is no header field (RFC 9110 §6.5.1)
        self._named_bytes += len(name) + len(value)
        if self._named_bytes > MAX_HEAD_BYTES:
            raise UpstreamMalformed(reason="the head is too long")
        self.headers.append((name.lower(), value.strip(b" \t")))  # RFC 9110 §5.5

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        version = self._parser.get_http_version()
        if version not in ("1.0", "1.1") or not _INFORMATIONAL <= status < _BEYOND:
            raise UpstreamMalformed(reason="not HTTP/1.1")
        if status == _SWITCHING:
            raise UpstreamMalformed(reason="switched protocols")
        if status < _FIRST_FINAL:  # 100 Continue, 103 Early Hints: RFC 9110 §15.2
            self.headers = []
            return
        if not is_framed(status, self.headers, version=version):
            raise UpstreamMalformed(reason="neither one length nor chunks")
        self.status = status
        self.begun = True
        self.persistent = self._parser.should_keep_alive()

    def on_body(self, body: bytes) -> None:
        self._chunks.append(body)
        self.waiting += len(body)

    def on_message_complete(self) -> None:
        self.complete = self.begun  # an informational answer is not the end


def is_framed(status: int, headers: Headers, *, version: str = "1.1") -> bool:
    """Say whether an answer's end can be told from a cut: chunked, or exactly one length (RFC 9112 §6.3).

    One that ends with its connection is refused, because cut off it would look complete.
    """
    codings = [value.lower() for name, value in headers if name == b"transfer-encoding"]
    lengths = [value for name, value in headers if name == b"content-length"]
    if codings:
        return codings == [b"chunked"] and not lengths and version == "1.1"  # RFC 9112 §6.1
    return status in _BODYLESS or (len(lengths) == 1 and lengths[0].isdigit())
