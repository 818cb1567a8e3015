"""What crosses to the sidecar, and what of its answer comes back."""

from urllib.parse import parse_qs, parse_qsl, quote, unquote, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.authorization import Permit, authorize
from proxy.errors import ClientProblem
from proxy.forwarding import (
    HOP_BY_HOP,
    NOT_DOWNWARD,
    UPWARD,
    client_query,
    downstream_headers,
    request_id_of,
    request_upstream,
)
from proxy.model import CredentialKind, Headers, Principal, UpstreamRequest
from proxy.operations import OPERATIONS, PAGING, SCOPES

ALICE = Principal("alice", "alice", "jwt:0::alice", SCOPES, CredentialKind.JWT)
PERMITS = {(row.method, row.path): authorize(ALICE, row) for row in OPERATIONS}
INVOKE = PERMITS["POST", "/agent/invoke"]
MESSAGES = PERMITS["GET", "/agent/v1/threads/{thread_id}/messages"]
MESSAGE = PERMITS["GET", "/agent/v1/threads/{thread_id}/messages/{message_id}"]
NAMES = st.sampled_from(
    [
        *sorted(UPWARD | NOT_DOWNWARD),
        *[b"authorization", b"cookie", b"x-api-key", b"x-forwarded-for", b"forwarded", b"host", b"content-length"],
        *[b"content-type", b"content-encoding", b"accept-encoding", b"origin", b"range", b"x-user-id", b"etag"],
        *[b"access-control-allow-origin", b"x-request-id", b"expect"],
    ]
)
HEADERS = st.lists(st.tuples(NAMES, st.sampled_from([b"1", b"close", b"etag, TE", b"", b"x"])), max_size=8)


def send(
    permit: Permit = INVOKE,
    *,
    parameters: dict[str, str] | None = None,
    query: bytes = b"",
    headers: Headers | None = None,
    body: bytes = b"",
) -> UpstreamRequest:
    """Build what the sidecar sees, with an identity and a request id of ours."""
    return request_upstream(
        permit,
        parameters=parameters or {},
        query=query,
        headers=headers or [],
        body=body,
        identity=b"ours",
        request_id=b"id-1",
    )


def test_a_run_is_sent() -> None:
    """Method and path come from the row; identity, id and media type are ours."""
    request = send(body=b'{"a":1}')

    assert request == UpstreamRequest(
        b"POST",
        b"/v1/graph/invoke",
        ((b"authorization", b"Bearer ours"), (b"x-request-id", b"id-1"), (b"content-type", b"application/json")),
        b'{"a":1}',
    )


def test_what_has_no_body_has_no_media_type() -> None:
    """A request without a body says nothing of one."""
    request = send(PERMITS["GET", "/agent/ping"])

    assert (request.method, request.target, request.body) == (b"GET", b"/ping", b"")
    assert [name for name, _ in request.headers] == [b"authorization", b"x-request-id"]


def test_the_fields_that_cross_are_named_here() -> None:
    """The allow-list is what it was decided to be: a field more is a decision, not an oversight."""
    assert {b"accept", b"accept-language", b"traceparent", b"tracestate", b"user-agent"} == UPWARD


@given(HEADERS)
def test_only_the_allow_list_crosses(headers: Headers) -> None:
    """Allowed fields cross in order, duplicates kept; of all others the sidecar sees nothing but ours."""
    request = send(headers=headers, body=b"{}")

    *crossed, authorization, request_id, media = request.headers
    assert crossed == [field for field in headers if field[0] in UPWARD]
    assert authorization == (b"authorization", b"Bearer ours")
    assert request_id == (b"x-request-id", b"id-1")
    assert media == (b"content-type", b"application/json")


def test_what_is_for_one_hop_goes_no_further() -> None:
    """A field that the client's `Connection` names is for us alone, though the allow-list has it (RFC 9110 §7.6.1)."""
    fields = [(b"user-agent", b"x"), (b"accept", b"*/*"), (b"connection", b"close ,\tUser-Agent")]

    request = send(headers=fields)

    assert [name for name, _ in request.headers] == [b"accept", b"authorization", b"x-request-id"]


def test_the_clients_credentials_never_cross() -> None:
    """Whatever field carries one, a client's secret is not in what the sidecar sees."""
    names = (
        b"authorization",
        b"cookie",
        b"x-api-key",
        b"proxy-authorization",
        b"origin",
        b"x-forwarded-for",
        b"forwarded",
    )

    request = send(headers=[(name, b"s3cret") for name in names])

    assert b"s3cret" not in repr(request).encode()


def test_parameters_fill_the_sidecars_path() -> None:
    """What was bound stands in the sidecar's path, and only there."""
    request = send(MESSAGE, parameters={"thread_id": "tag~a", "message_id": "m:1"}, query=b"limit=1")

    assert request.target == b"/v1/threads/tag~a/messages/m%3A1"


@given(st.text(), st.text())
def test_a_parameter_cannot_leave_its_segment(thread_id: str, message_id: str) -> None:
    """Whatever a parameter holds, the path has as many segments, no query, and decodes to what was given."""
    target = send(MESSAGE, parameters={"thread_id": thread_id, "message_id": message_id}).target

    parts = target.decode("ascii").split("/")
    assert len(parts) == 6
    assert [unquote(parts[3]), unquote(parts[5])] == [thread_id, message_id]
    assert not set(target) & set(b"?#\\ \r\n{}")


def test_a_value_is_no_template() -> None:
    """Braces in a parameter are characters like others."""
    target = send(MESSAGE, parameters={"thread_id": "{message_id}", "message_id": "{0.__class__}"}).target

    assert target == b"/v1/threads/%7Bmessage_id%7D/messages/%7B0.__class__%7D"


@given(st.dictionaries(st.sampled_from([*sorted(PAGING), "user_id", "x"]), st.text(max_size=8)))
def test_only_the_rows_parameters_cross(query: dict[str, str]) -> None:
    """Of a query, the row's names cross with their values, whatever these hold."""
    raw = "&".join(f"{quote(name, safe='')}={quote(value, safe='')}" for name, value in query.items()).encode()

    request = send(MESSAGES, parameters={"thread_id": "a"}, query=raw)

    split = urlsplit(request.target.decode("ascii"))
    assert split.path == "/v1/threads/a/messages"
    assert dict(parse_qsl(split.query, keep_blank_values=True)) == {n: v for n, v in query.items() if n in PAGING}


@pytest.mark.parametrize("permit", [INVOKE, MESSAGE, PERMITS["GET", "/agent/ping"]], ids=lambda p: p.operation.name)
def test_a_row_without_a_query_has_none(permit: Permit) -> None:
    """Where the row names no query parameter, none crosses, and none is read."""
    request = send(permit, parameters={"thread_id": "a", "message_id": "b"}, query=b"limit=1&limit=2&%ff")

    assert b"?" not in request.target


def test_blank_values_cross() -> None:
    """A parameter may be empty; that is not the same as absent."""
    target = send(MESSAGES, parameters={"thread_id": "a"}, query=b"search=&limit=3").target

    assert parse_qs(urlsplit(target.decode()).query, keep_blank_values=True) == {"search": [""], "limit": ["3"]}


@pytest.mark.parametrize(
    ("query", "told"),
    [
        (b"limit=1&limit=2", "twice"),
        (b"limit=1&x=2&limit=1", "twice"),
        (b"limit=1&%6Cimit=1", "twice"),
        (b"search=%ff", "cannot be read"),
        (b"search=\xff", "cannot be read"),
        (b"x=%ff", "cannot be read"),
        (b"&".join(b"x%d=1" % number for number in range(33)), "cannot be read"),
    ],
)
def test_a_query_that_means_two_things_is_refused(query: bytes, told: str) -> None:
    """A parameter that comes twice, is no UTF-8, or is one of a flood is the client's problem."""
    with pytest.raises(ClientProblem, match=told) as refused:
        send(MESSAGES, parameters={"thread_id": "a"}, query=query)

    assert refused.value.status == 400


@given(st.binary(max_size=60) | st.text("limtoffse=&%20;+\xff", max_size=30).map(str.encode))
def test_any_query_is_read_or_refused(query: bytes) -> None:
    """No query string fails in another way, and what is read has allowed names only."""
    try:
        read = client_query(query, PAGING)
    except ClientProblem:
        return

    assert set(read) <= PAGING


def test_names_that_are_not_the_rows_may_repeat() -> None:
    """What is dropped anyway may come as often as it likes."""
    assert client_query(b"x=1&x=2&limit=3", PAGING) == {"limit": "3"}


@pytest.mark.parametrize("value", [b"a", b"A-1_b.c:d@e=f+g/h", b"a" * 128])
def test_a_safe_request_id_is_kept(value: bytes) -> None:
    """A client's own id is passed on if it can be logged as it is."""
    assert request_id_of([(b"accept", b"*/*"), (b"x-request-id", value)]) == value


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"x-request-id", b"")],
        [(b"x-request-id", b"a" * 129)],
        [(b"x-request-id", b"a b")],
        [(b"x-request-id", b"a\n")],
        [(b"x-request-id", b'a"')],
        [(b"x-request-id", b"a\\")],
        [(b"x-request-id", b"\x1b[31m")],
        [(b"x-request-id", "é".encode())],
        [(b"x-request-id", b"a,b")],
        [(b"x-request-id", b"a"), (b"x-request-id", b"a")],
        [(b"x-request-ids", b"a")],
    ],
)
def test_another_request_id_is_dropped(headers: Headers) -> None:
    """An id that could forge a line of log, or two of them, is none."""
    assert request_id_of(headers) is None


@given(HEADERS)
def test_what_comes_back_is_not_about_the_hop(headers: Headers) -> None:
    """Hop-by-hop fields, those that `Connection` names and those that steer proxies do not come back."""
    named = {token.strip().lower() for name, value in headers if name == b"connection" for token in value.split(b",")}

    *kept, cache, buffering = downstream_headers(headers)

    assert (cache, buffering) == ((b"cache-control", b"no-cache, no-transform"), (b"x-accel-buffering", b"no"))
    assert [field for field in headers if field in kept] == kept
    for name, _ in kept:
        assert name not in HOP_BY_HOP
        assert name not in NOT_DOWNWARD
        assert name not in named
        assert not name.startswith(b"access-control-")
    dropped = [name for name, value in headers if (name, value) not in kept]
    assert all(name in NOT_DOWNWARD | named or name.startswith(b"access-control-") for name in dropped)


@pytest.mark.parametrize(
    "name",
    ["connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
     "transfer-encoding", "upgrade", "set-cookie", "server", "date", "www-authenticate", "location", "x-accel-redirect",
     "x-accel-buffering", "cache-control", "x-request-id", "alt-svc", "strict-transport-security",
     "clear-site-data", "refresh", "content-security-policy", "access-control-allow-origin",
     "access-control-allow-credentials"],
)  # fmt: skip
def test_the_sidecars_own_fields_stay_behind(name: str) -> None:
    """Each of these is about the sidecar, or would steer whoever stands before us."""
    kept = downstream_headers([(name.encode(), b"theirs")])

    assert (name.encode(), b"theirs") not in kept


@pytest.mark.parametrize("name", [b"content-type", b"content-length", b"content-encoding", b"etag", b"x-model"])
def test_what_is_about_the_bytes_comes_back(name: bytes) -> None:
    """The bytes are the sidecar's, so what it says of them stands, as often as it says it."""
    kept = downstream_headers([(name, b"1"), (b"connection", b"X-Hop"), (b"x-hop", b"2"), (name, b"3")])

    assert kept[:-2] == [(name, b"1"), (name, b"3")]
