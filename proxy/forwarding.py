"""What crosses, in each direction: the target, the headers, the internal identity.

Pure. The upstream's headers are built from nothing but an allow-list; the client's credential is never on it.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Final
from urllib.parse import parse_qsl, quote, urlencode

import pydantic_core

from proxy.authorization import Permit
from proxy.errors import ClientProblem
from proxy.model import Headers, Principal, UpstreamRequest
from proxy.operations import Kind

UPWARD: Final = frozenset({b"accept", b"accept-language", b"traceparent", b"tracestate", b"user-agent"})
"""The client's header fields that may cross to the sidecar."""
HOP_BY_HOP: Final = frozenset(
    {b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te",
     b"trailer", b"transfer-encoding", b"upgrade"}
)  # fmt: skip
"""RFC 9110 §7.6.1."""
NOT_DOWNWARD: Final = HOP_BY_HOP | frozenset(
    {b"date", b"server", b"set-cookie", b"x-request-id", b"www-authenticate", b"location", b"content-security-policy",
     b"cache-control", b"alt-svc", b"strict-transport-security", b"clear-site-data", b"refresh",
     b"ratelimit", b"ratelimit-policy"}
)  # fmt: skip
"""The sidecar's fields that are about itself."""
STEERING: Final = (b"access-control-", b"x-accel-")
"""Beginnings of the sidecar's fields that steer browsers and nginx, which is our business."""
_OF_ONE_TRACE: Final = frozenset({b"x-request-id", b"traceparent", b"tracestate"})
_BODYLESS: Final = frozenset({204, 304})
_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9_.:@=+/-]{1,128}")


def request_id_of(headers: Headers) -> bytes | None:
    """Give the client's request id if it sent exactly one that is safe to log and pass on."""
    values = [value for name, value in headers if name == b"x-request-id"]
    return values[0] if len(values) == 1 and _REQUEST_ID.fullmatch(values[0]) else None


def request_upstream(
    permit: Permit,
    *,
    parameters: Mapping[str, str],
    query: bytes,
    headers: Headers,
    body: bytes,
    identity: bytes,
    request_id: bytes,
    traceparent: bytes | None = None,
) -> UpstreamRequest:
    """Build what the sidecar will see of a permitted request.

    `parameters` fill the row's upstream path; `query` is the raw query string, of which only the row's
    names cross; `traceparent` is sent instead of the client's own. Raises ClientProblem for a repeated or
    undecodable query parameter.
    """
    target = permit.operation.upstream
    if parameters:
        target = target.format_map({name: quote(value, safe="~") for name, value in parameters.items()})
    if query and permit.operation.query:
        target = f"{target}?{urlencode(client_query(query, permit.operation.query))}"
    hop = connection_fields(headers)
    sent: Headers = [field for field in headers if field[0] in UPWARD and field[0] not in hop]
    sent += ((b"authorization", b"Bearer " + identity), (b"x-request-id", request_id))
    if traceparent is not None:
        sent = [field for field in sent if field[0] != b"traceparent"]
        sent.append((b"traceparent", traceparent))
    if body:
        sent.append((b"content-type", b"application/json"))
    return UpstreamRequest(permit.operation.method.encode(), target.encode(), tuple(sent), body)


def trail_of(headers: Iterable[tuple[bytes, bytes]]) -> tuple[tuple[bytes, bytes], ...]:
    """Give the fields that name a request and its trace."""
    return tuple(field for field in headers if field[0] in _OF_ONE_TRACE)


def encode_request(request: UpstreamRequest, authority: bytes) -> bytes:
    """Write a request, head and body, as HTTP/1.1 (RFC 9112 §3)."""
    parts = [request.method, b" ", request.target, b" HTTP/1.1\r\nhost: ", authority]
    for name, value in request.headers:
        parts += (b"\r\n", name, b": ", value)
    if request.body or request.method == b"POST":
        parts.append(b"\r\ncontent-length: %d" % len(request.body))
    parts += (b"\r\n\r\n", request.body)
    return b"".join(parts)


def stop_upstream(
    permit: Permit, identity: Callable[[Principal], bytes], thread_id: str, headers: Iterable[tuple[bytes, bytes]]
) -> UpstreamRequest:
    """Build what asks the sidecar to stop a run: whoever may run may have his own run stopped, so its permit does.

    It carries the trail of the run's own request, which had these `headers`; `identity` makes a token anew.
    """
    if permit.operation.kind not in (Kind.RUN, Kind.AG_UI, Kind.DUPLEX):
        raise ValueError("not the permit of a run")
    fields = (
        (b"authorization", b"Bearer " + identity(permit.principal)),
        (b"content-type", b"application/json"),
        *trail_of(headers),
    )
    body = pydantic_core.to_json({"thread_id": thread_id, "config": {}})
    return UpstreamRequest(b"POST", b"/v1/graph/stop", fields, body)


def client_query(query: bytes, allowed: frozenset[str]) -> dict[str, str]:
    """Read the `allowed` parameters of a raw query string; others are dropped.

    Raises ClientProblem when one comes twice or is no UTF-8.
    """
    try:
        pairs = parse_qsl(query.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=32)
    except ValueError as error:
        raise ClientProblem("The query string cannot be read.") from error
    kept = [(name, value) for name, value in pairs if name in allowed]
    if len(kept) != len(dict(kept)):
        raise ClientProblem("A query parameter came twice.")
    return dict(kept)


def connection_fields(headers: Headers) -> frozenset[bytes]:
    """Give the names that `Connection` declares to be for one hop only (RFC 9110 §7.6.1)."""
    declared = [value for name, value in headers if name == b"connection"]
    if not declared:
        return frozenset()
    return frozenset(token.strip().lower() for value in declared for token in value.split(b","))


def downstream_headers(headers: Headers, *, status: int = 200) -> Headers:
    """Give the fields of upstream's head that reach the client: not hop-by-hop, not about the sidecar itself.

    Content codings and lengths stay as they are, since the bytes do; but an answer that has no body by its
    `status` gets no length, which is of a body it does not send (RFC 9110 §8.6). Caches and proxies on the way
    are told to pass everything on at once.
    """
    hop = connection_fields(headers)
    if status in _BODYLESS:
        hop |= {b"content-length"}
    kept = [
        field
        for field in headers
        if field[0] not in NOT_DOWNWARD and field[0] not in hop and not field[0].startswith(STEERING)
    ]
    kept.append((b"cache-control", b"no-cache, no-transform"))
    kept.append((b"x-accel-buffering", b"no"))
    return kept
