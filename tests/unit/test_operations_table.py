"""The allow-list: what its rows promise, and the one way a path is written."""

import re
from collections import Counter
from urllib.parse import quote, unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.cli import main
from proxy.operations import (
    IMPERSONATE,
    NOT_EXPOSED,
    NOT_EXPOSED_PREFIXES,
    OPERATIONS,
    PAGING,
    SCOPES,
    STREAM,
    USUAL_SCOPES,
    Kind,
    Operation,
    is_canonical,
)

PATH = re.compile(r"(/([a-z0-9-]+|\{[a-z_]+\}))+")
ROWS = pytest.mark.parametrize("row", OPERATIONS, ids=lambda row: f"{row.method} {row.path}")


def names_in(path: str) -> set[str]:
    """Give the parameters of a path."""
    return set(re.findall(r"\{([a-z_]+)\}", path))


@ROWS
def test_a_row_is_well_formed(row: Operation) -> None:
    """Paths are absolute and plain, ours under `/agent`; methods, scopes, costs and words are as they should be."""
    assert PATH.fullmatch(row.path)
    assert PATH.fullmatch(row.upstream)
    assert row.path.startswith("/agent/")
    assert row.method in {"GET", "POST", "DELETE"}
    assert row.scope in SCOPES
    assert row.cost >= 1
    assert row.summary
    assert row.query <= PAGING


@ROWS
def test_what_a_row_forwards_comes_from_its_path(row: Operation) -> None:
    """Every parameter of the sidecar's path is one of ours, and none of ours is lost."""
    assert names_in(row.upstream) == names_in(row.path)


@ROWS
def test_the_kind_of_a_row_is_how_its_thread_is_bound(row: Operation) -> None:
    """A thread id in a path is bound from it, one in a body from that; no row has a thread that nothing binds."""
    in_path = "thread_id" in names_in(row.path)

    assert in_path == (row.kind is Kind.THREAD)
    assert ("file_id" in names_in(row.path)) == (row.kind in (Kind.FILE, Kind.FILE_FACTS))
    assert (row.method == "POST") == (row.kind in (Kind.RUN, Kind.AG_UI, Kind.CONTROL, Kind.UPLOAD))
    assert (row.kind is Kind.LISTING) == (row.upstream == "/v1/threads")
    assert (row.kind is Kind.PLAIN) == (row.upstream == "/ping")


def test_no_two_rows_are_one() -> None:
    """One method and path is one row; rows of one name are one operation by two paths."""
    routes = Counter((row.method, re.sub(r"\{[a-z_]+\}", "{}", row.path)) for row in OPERATIONS)
    meanings = {(row.name, row.method, row.upstream, row.scope, row.kind, row.query, row.cost) for row in OPERATIONS}

    assert set(routes.values()) == {1}
    assert len(meanings) == len({row.name for row in OPERATIONS})


def test_every_scope_opens_something() -> None:
    """There is no scope that means nothing; to act for others is the one that no operation needs."""
    assert {row.scope for row in OPERATIONS} == USUAL_SCOPES == SCOPES - {IMPERSONATE}


def test_scopes_fit_into_a_header() -> None:
    """A scope is a scope-token of RFC 6749 §3.3: it is told in a quoted string."""
    assert all(re.fullmatch(r"[a-z]+:[a-z]+", scope) for scope in SCOPES)


def test_nothing_is_exposed_that_is_said_not_to_be() -> None:
    """What has a reason for having no row has no row, and each reason is given."""
    exposed = {(row.method, row.upstream) for row in OPERATIONS}

    assert not exposed & set(NOT_EXPOSED)
    assert not [route for _, route in exposed for prefix in NOT_EXPOSED_PREFIXES if route.startswith(prefix)]
    assert all(NOT_EXPOSED.values())
    assert all(NOT_EXPOSED_PREFIXES.values())


@ROWS
def test_deleting_and_stopping_need_scopes_of_their_own(row: Operation) -> None:
    """Who may read may not delete, and who may run may not stop."""
    sharing = {other.name for other in OPERATIONS if other.scope == row.scope}

    if row.scope == STREAM:
        assert sharing == {"stream", "ag-ui", "ws"}  # one right, in whichever protocol
    elif row.name in {"invoke", "stop", "threads.delete", "files.upload", "ping"}:
        assert sharing == {row.name}
    else:
        assert row.method == "GET"


@pytest.mark.parametrize(
    ("raw", "canonical"),
    [
        (b"/agent/invoke", True),
        (b"/agent/v1/threads/a~b.c", True),
        (b"/agent/v1/threads/a%20b", True),
        (b"/agent/v1/threads/%61", True),
        (b"/agent/v1/threads/a%3Fb%23c", True),
        (b"/agent/v1/threads/%252e%252e", True),
        (b"/agent/v1/threads/...", True),
        (b"/agent/v1/threads/a..b", True),
        (b"/agent/v1/threads/a%5Cb", True),
        (b"/", False),
        (b"//", False),
        (b"/agent/invoke/", False),
        (b"//agent/invoke", False),
        (b"/agent//invoke", False),
        (b"/agent/./invoke", False),
        (b"/agent/../agent/invoke", False),
        (b"/agent/invoke/.", False),
        (b"/agent/invoke/..", False),
        (b"/agent/%2e/invoke", False),
        (b"/agent/%2E%2e/invoke", False),
        (b"/agent/.%2e/invoke", False),
        (b"/agent%2finvoke", False),
        (b"/agent/v1/threads/a%2Fb", False),
        (b"/agent/v1/threads/a%2f", False),
        (b"/agent/v1/threads/%2f%2f", False),
        (b"%2fagent/invoke", False),
        (b"/agent/invoke%0a", False),
        (b"/agent/v1/threads/a%00", False),
        (b"/agent/v1/threads/a%e2%80%a8", False),
        (b"/agent/v1/threads/a%ff", True),
    ],
)
def test_a_path_is_written_in_one_way(raw: bytes, canonical: bool) -> None:
    """Coded slashes, dot segments, coded or not, and empty segments lead nowhere."""
    assert is_canonical(raw, unquote(raw.decode())) is canonical


@given(st.lists(st.text("ab./%2eEfF\\ ~", max_size=4), max_size=4).map(lambda parts: "/" + "/".join(parts)))
def test_a_canonical_path_keeps_its_segments(raw: str) -> None:
    """What is decoded once has as many segments as were written, none of which a path would swallow."""
    path = unquote(raw)

    if is_canonical(raw.encode(), path):
        segments = path.split("/")[1:]
        assert len(segments) == raw.count("/")
        assert not set(segments) & {"", ".", ".."}
    else:
        assert {"", ".", ".."} & set(path.split("/")[1:]) or "%2f" in raw.lower()


@given(
    st.lists(
        st.text(min_size=1, max_size=6).filter(
            lambda text: text not in {".", ".."} and "/" not in text and text.isprintable()
        ),
        min_size=1,
    )
)
def test_any_other_encoding_of_a_parameter_is_canonical(segments: list[str]) -> None:
    """A parameter may be percent-encoded in whole, in part, or not at all."""
    path = "/" + "/".join(segments)
    raw = "/" + "/".join(quote(segment, safe="") for segment in segments)

    assert is_canonical(raw.encode(), path)


def test_the_command_tells_what_bounds_each_kind(capsys: pytest.CaptureFixture[str]) -> None:
    """A file has its own size and time, a WebSocket those of each message and of the whole."""
    assert main(["operations"]) == 0
    told = {line.split()[1]: line for line in capsys.readouterr().out.splitlines()}

    assert told["/agent/v1/files/upload"].endswith("27262976 bytes, 120 s")
    assert told["/agent/v1/graph/ws"].endswith("1048576 bytes a message, 3600 s")
    assert told["/agent/v1/files/{file_id}"].endswith("no body, 30 s")
