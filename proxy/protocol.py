"""HTTP/1.1 towards the client, as uvicorn speaks it, less what a proxy must not take on: pipelining and upgrades.

Refuses before a request exists; knows nothing of what requests mean.
"""

from collections.abc import Callable
from typing import Any, Final, override

import pydantic_core
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_ANNOUNCE_A_BODY: Final = frozenset({b"content-length", b"transfer-encoding"})


class RefusedError(Exception):
    """Raised inside the parser to stop it; uvicorn then calls `send_400_response`."""


class OneAtATime(HttpToolsProtocol):
    """One request on a connection at a time.

    uvicorn queues pipelined requests without bound, and tells only the newest of them that the client left; and
    it takes the body of a request that offers an upgrade for the next request. Neither is something we need.
    """

    _was_closing = False

    def __init__(self, *args: Any, note_refusal: Callable[..., None] | None = None, **options: Any) -> None:  # noqa: ANN401  uvicorn's
        super().__init__(*args, **options)
        self._note_refusal = note_refusal

    @override
    def on_message_begin(self) -> None:
        if self._is_answering():
            raise RefusedError("pipelined")
        super().on_message_begin()

    @override
    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade() and any(name in _ANNOUNCE_A_BODY for name, _ in self.headers):
            raise RefusedError("a body behind an upgrade")
        super().on_headers_complete()

    @override
    def send_400_response(self, msg: str) -> None:
        """Answer what is no request of ours with a problem; in the middle of an answer, cut that instead."""
        if self._is_answering():
            self.transport.abort()
            return
        problem = {"type": "about:blank", "title": "Not an HTTP request that is served here", "status": 400}
        body = pydantic_core.to_json(problem | {"detail": msg, "code": "invalid_request"})
        head = "HTTP/1.1 400 Bad Request\r\ncontent-type: application/problem+json\r\nconnection: close\r\n"
        self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()
        if self._note_refusal is not None:
            self._note_refusal(self.client, reason=msg, sent=len(body))

    def give_up_closing(self) -> None:
        """Abort a connection that was closing already when this was called before: its client does not read.

        A closed transport waits for its client to take what was written, and holds a descriptor for as long.
        """
        if self.transport.is_closing():
            if self._was_closing:
                self.transport.abort()
            self._was_closing = True

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete
