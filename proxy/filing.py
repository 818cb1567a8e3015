"""The phases of what concerns files: uploads go on as they come, and a file is its owner's by its handle.

Holds no file; what a file is called outside is in `handles`, how its bytes travel in `uploads` and `relay`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from proxy.authorization import Permit
from proxy.forwarding import downstream_headers, request_upstream
from proxy.handles import Handles, sealed_answer
from proxy.model import RECORD, Deadlines, Headers, Lease, Message, Receive, Record, Scope, Send, UpstreamRequest
from proxy.operations import Kind
from proxy.relay import Relay
from proxy.routes import Phase
from proxy.tokens import InternalIdentity
from proxy.uploads import Uploads

_OK: Final = 200
_INERT: Final[Headers] = [
    (b"content-security-policy", b"default-src 'none'; sandbox"),
    (b"x-content-type-options", b"nosniff"),
]
"""What a caller uploaded is never run as a page of this origin, nor as another type than it is labelled."""


@dataclass(frozen=True, slots=True)
class Filing:
    """The phases of files, with what they need."""

    relay: Relay
    uploads: Uploads
    identity: InternalIdentity
    secret: bytes
    deadlines: Deadlines

    def phases(self) -> Mapping[Kind, Phase]:
        """Give the phase of each kind of operation on files."""
        return {Kind.UPLOAD: self.upload, Kind.FILE: self.file, Kind.FILE_FACTS: self.facts}

    async def upload(self, permit: Permit, tag: str, lease: Lease, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002  it is released with the request
        """Pass an upload on; its answer tells the caller the file's handle."""
        record: Record = scope[RECORD]

        async def counted() -> Message:
            message = await receive()
            record.received_bytes += len(message.get("body", b""))
            return message

        request, caller = self._upstream(permit, scope), permit.principal.partition
        answer = await self.uploads.pass_on(request, scope["headers"], counted, caller=caller)
        body = answer.take()
        if answer.status == _OK:
            body = sealed_answer(body, Handles(tag, self.secret))
        await _respond(send, answer.status, answer.headers, body)

    async def file(self, permit: Permit, tag: str, lease: Lease, scope: Scope, receive: Receive, send: Send) -> None:
        """Relay a file of the caller's, byte for byte, in a form that no browser runs."""

        async def inert(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [field for field in message["headers"] if field[0] not in (name for name, _ in _INERT)]
                message["headers"] = [*kept, *_INERT]
            await send(message)

        request = self._upstream(permit, scope, file_id=self._file_id(scope, tag))
        await self.relay.relay(request, self.deadlines, lease, receive, inert)

    async def facts(self, permit: Permit, tag: str, lease: Lease, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002  it is released with the request
        """Answer what the sidecar knows of a file of the caller's, under its handle."""
        request = self._upstream(permit, scope, file_id=self._file_id(scope, tag))
        status, body = await self.relay.collect(request, self.deadlines, receive)
        if status == _OK:
            body = sealed_answer(body, Handles(tag, self.secret))
        await _respond(send, status, [(b"content-type", b"application/json")], body)

    def _file_id(self, scope: Scope, tag: str) -> str:
        return Handles(tag, self.secret).open(scope["path_params"]["file_id"])

    def _upstream(self, permit: Permit, scope: Scope, *, file_id: str = "") -> UpstreamRequest:
        record: Record = scope[RECORD]
        return request_upstream(
            permit,
            parameters={"file_id": file_id} if file_id else {},
            query=b"",
            headers=scope["headers"],
            body=b"",
            identity=self.identity.token(permit.principal),
            request_id=record.request_id,
            traceparent=record.forward(permit.operation.method, permit.operation.upstream),
        )


async def _respond(send: Send, status: int, headers: Headers, body: bytes) -> None:
    kept = [field for field in downstream_headers(headers) if field[0] != b"content-length"]
    head = [*kept, (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body, "more_body": False})
