"""The caller's own threads, out of whatever the sidecar lists."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import ClientProblem
from proxy.listing import UPSTREAM_PAGE, Gathering, Page, encode_listing, own, page_of, select, threads_of
from proxy.outages import UpstreamMalformed

TAG = "aaaabbbbccccdddd"
OTHER = "eeeeffffgggghhhh"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["data", "threads", "thread_id", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)


def thread(thread_id: object, **more: object) -> dict[str, Any]:
    """Make a thread as the sidecar lists it."""
    return {"thread_id": thread_id, **more}


def listing(*threads: object) -> bytes:
    """Write an answer as the sidecar does."""
    return json.dumps({"data": {"threads": threads, "more": 1}, "metadata": {"n": 2}}).encode()


@pytest.mark.parametrize(
    ("query", "page"),
    [
        ({}, Page("", 0, 100)),
        ({"search": "ÄB", "offset": "3", "limit": "7"}, Page("äb", 3, 7)),
        ({"offset": "0", "limit": "1"}, Page("", 0, 1)),
        ({"limit": str(UPSTREAM_PAGE)}, Page("", 0, UPSTREAM_PAGE)),
        ({"limit": str(UPSTREAM_PAGE + 1)}, Page("", 0, UPSTREAM_PAGE)),
        ({"offset": "999999999", "limit": "999999999"}, Page("", 999_999_999, UPSTREAM_PAGE)),
        ({"offset": "007", "search": " x "}, Page(" x ", 7, 100)),
    ],
)
def test_a_page_is_read(query: dict[str, str], page: Page) -> None:
    """Search, offset and limit are read, and a limit beyond the sidecar's page is that page."""
    assert page_of(query) == page


@pytest.mark.parametrize("name", ["offset", "limit"])
@pytest.mark.parametrize("text", ["", "-1", "+1", "1.0", "1e3", " 1", "1 ", "1_0", "x", "\u0661", "\u00b2", "1" * 10])
def test_what_is_no_count_is_refused(name: str, text: str) -> None:
    """A count is a few ASCII digits and nothing else; which one was wrong is told."""
    with pytest.raises(ClientProblem) as refused:
        page_of({name: text})

    assert refused.value.detail.startswith(name)


def test_a_limit_of_none_is_refused() -> None:
    """A page has at least one thread's room; an offset may be none."""
    with pytest.raises(ClientProblem, match="limit must be a whole number of at least 1"):
        page_of({"limit": "0"})

    assert page_of({"offset": "0"}).offset == 0


@given(
    st.dictionaries(st.sampled_from(["search", "offset", "limit", "x"]), st.text() | st.from_regex(r"\A[0-9]{1,12}\Z"))
)
def test_any_query_is_a_page_or_refused(query: dict[str, str]) -> None:
    """No query fails in another way, and every page is within bounds."""
    try:
        page = page_of(query)
    except ClientProblem:
        return

    assert page.offset >= 0
    assert 1 <= page.limit <= UPSTREAM_PAGE


def test_a_listing_is_read() -> None:
    """The answer is kept whole, and its threads are found in it."""
    answer, threads = threads_of(listing(thread("a", x=1), thread(7)))

    assert threads == [{"thread_id": "a", "x": 1}, {"thread_id": 7}]
    assert answer["metadata"] == {"n": 2}


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"{",
        b"\xff",
        b"[]",
        b"null",
        b"1",
        b'"data"',
        b"{}",
        b'{"data":null}',
        b'{"data":[]}',
        b'{"data":{}}',
        b'{"data":{"threads":null}}',
        b'{"data":{"threads":1}}',
        b'{"data":{"threads":"ab"}}',
        b'{"data":{"threads":{"a":{}}}}',
        b'{"data":{"threads":[1]}}',
        b'{"data":{"threads":[[]]}}',
        b'{"data":{"threads":["thread_id"]}}',
        b'{"data":{"threads":[null]}}',
        b'{"data":{"threads":[{}]}}',
        b'{"data":{"threads":[{"thread_id":null}]}}',
        b'{"data":{"threads":[{"thread_id":1.5}]}}',
        b'{"data":{"threads":[{"thread_id":["a"]}]}}',
        b'{"data":{"threads":[{"thread_id":"a"},{"thread_id":{}}]}}',
        b'{"data":{"threads":[{"thread_id":' + b"9" * 5000 + b"}]}}",
        b'{"data":{"threads":' + b"[" * 5000 + b"]" * 5000 + b"}}",
    ],
    ids=lambda answer: repr(answer[:48]),
)
def test_what_is_no_listing_is_the_sidecars_fault(answer: bytes) -> None:
    """An answer of another shape is refused whole: a thread without an id is nobody's."""
    with pytest.raises(UpstreamMalformed):
        threads_of(answer)


def test_only_ones_own_threads_are_kept() -> None:
    """A thread is one's own by the beginning of its id, and by nothing else about it."""
    threads = [
        thread(f"{TAG}~a"),
        thread(f"{OTHER}~{TAG}~a", user_id=TAG, title=f"{TAG}~a"),
        thread(f"{TAG}a"),
        thread(TAG),
        thread(f" {TAG}~b"),
        thread(f"{TAG.upper()}~c"),
        thread(f"x{TAG}~d"),
        thread(7),
        thread(True),
        thread(f"{TAG}~"),
    ]

    kept = own(threads, TAG)

    assert [each["thread_id"] for each in kept] == [f"{TAG}~a", f"{TAG}~"]


@pytest.mark.parametrize(
    ("search", "found"),
    [
        ("", ["a", "b", "c"]),
        ("alpha", ["a"]),
        ("beta", ["b", "c"]),
        ("deep", ["c"]),
        ("42", ["b"]),
        ("~c", ["c"]),
        ("title", []),
        ("nothing", []),
    ],
)
def test_a_search_is_in_the_values(search: str, found: list[str]) -> None:
    """Every value of a thread is searched without case; the names of its members are not."""
    threads = [
        thread(f"{TAG}~a", title="ALPHA"),
        thread(f"{TAG}~b", title="Beta", n=42),
        thread(f"{TAG}~c", title="beta", meta={"k": ["Deep"]}),
    ]

    selected = select(threads, Page(search, 0, 10))

    assert [each["thread_id"].removeprefix(f"{TAG}~") for each in selected] == found


@given(
    st.lists(st.sampled_from([f"{TAG}~a", f"{TAG}~b", f"{OTHER}~a", f"{TAG}x", 7]), max_size=12),
    st.sampled_from(["", "~a", "~b", "z"]),
    st.integers(0, 5),
    st.integers(1, 5),
)
def test_pages_are_of_ones_own_threads(ids: list[object], search: str, offset: int, limit: int) -> None:
    """Pages follow one another without gap or repetition, in the sidecar's order, and hold nobody else's."""
    _, threads = threads_of(listing(*(thread(thread_id, n=n) for n, thread_id in enumerate(ids))))

    mine = own(threads, TAG)
    paged = select(mine, Page(search, offset, limit)) + select(mine, Page(search, offset + limit, limit))

    matching = [
        n for n, thread_id in enumerate(ids) if str(thread_id).startswith(f"{TAG}~") and search in str(thread_id)
    ]
    assert [each["n"] for each in paged] == matching[offset : offset + 2 * limit]


def test_the_answer_is_the_sidecars_but_for_its_threads() -> None:
    """Whatever else the sidecar said stays as it was."""
    answer, _ = threads_of(listing(thread("a")))

    written = json.loads(encode_listing(answer, [thread("b")]))

    assert written == {"data": {"threads": [{"thread_id": "b"}], "more": 1}, "metadata": {"n": 2}}


@given(JSON.map(lambda value: json.dumps(value).encode()) | JSON.map(listing) | st.binary(max_size=20))
def test_any_answer_is_a_listing_or_refused(answer: bytes) -> None:
    """Whatever the sidecar sends ends in its own threads, as JSON, or in the one problem."""
    try:
        value, threads = threads_of(answer)
    except UpstreamMalformed:
        return

    written = json.loads(encode_listing(value, select(own(threads, TAG), Page("x", 0, 10))))

    assert all(str(each["thread_id"]).startswith(f"{TAG}~") for each in written["data"]["threads"])


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"[-1e999]"])
def test_an_odd_number_does_not_spoil_the_answer(number: bytes) -> None:
    """What JSON cannot say is not said: an answer with it is refused, or written as JSON that anyone can read."""
    answer = b'{"data":{"threads":[{"thread_id":"%b~a","score":%b}]}}' % (TAG.encode(), number)

    try:
        value, threads = threads_of(answer)
        written = encode_listing(value, own(threads, TAG))
    except UpstreamMalformed:
        written = b""

    assert b"NaN" not in written
    assert b"Infinity" not in written


class Store:
    """A sidecar's store: it keeps callers apart or does not, and finds ids by a search or does not."""

    def __init__(self, mine: int, others: int, *, apart: bool, searches: bool) -> None:
        rows = [thread(f"{OTHER}~{n}", updated_at=f"2026-02-{n:06}") for n in range(others)]
        own_rows = [thread(f"{TAG}~{n}", updated_at=f"2026-01-{n:06}") for n in range(mine)]
        self.rows = own_rows if apart else [*rows, *own_rows]
        self.searches = searches
        self.asked = 0

    def page(self, window: dict[str, str | int]) -> bytes:
        """Answer as it would."""
        self.asked += 1
        search = str(window.get("search", ""))
        rows = [row for row in self.rows if not search or (self.searches and search in row["thread_id"])]
        offset, limit = int(window["offset"]), int(window["limit"])
        return listing(*rows[offset : offset + limit])


@pytest.mark.parametrize("mine", [0, 1, 999, 1000, 1001, 2500])
@pytest.mark.parametrize("others", [0, 1, 999, 1000, 5000])
@pytest.mark.parametrize(("apart", "searches"), [(True, True), (True, False), (False, True), (False, False)])
def test_every_thread_of_ones_own_is_found(mine: int, others: int, apart: bool, searches: bool) -> None:
    """However many there are, and however many of others', in whichever store; the latest changed comes first."""
    store = Store(mine, others, apart=apart, searches=searches)
    gathering = Gathering(TAG)

    while (window := gathering.next_window()) is not None:
        gathering.take(store.page(window))

    found = [row["thread_id"] for row in gathering.threads()]
    assert found == [f"{TAG}~{n}" for n in reversed(range(mine))]
    assert store.asked <= 12


def test_others_threads_do_not_hide_ones_own() -> None:
    """A hundred thousand of others' cost one page, where ids can be searched for."""
    store = Store(3, 100_000, apart=False, searches=True)
    gathering = Gathering(TAG)

    while (window := gathering.next_window()) is not None:
        gathering.take(store.page(window))

    assert len(gathering.threads()) == 3
    assert store.asked == 2
