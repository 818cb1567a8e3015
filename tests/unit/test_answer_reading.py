"""Reading one HTTP/1.1 answer, tested as a parser: every border, every cut, every departure from the rules.

What an answer means never depends on how its bytes were parted on the way.
"""

from contextlib import suppress
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.answers import MAX_HEAD_BYTES, Answer, is_framed
from proxy.model import Headers
from proxy.outages import UpstreamMalformed

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
WHOLE = OK + b"Content-Length: 5\r\n\r\nhello"


@dataclass(frozen=True, slots=True)
class Read:
    """What is known of an answer after some of its bytes."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    begun: bool
    complete: bool
    surplus: bool
    persistent: bool


def read(*parts: bytes) -> Read:
    """Feed `parts`, taking the body after each."""
    answer = Answer()
    body = b""
    for part in parts:
        answer.feed(part)
        waiting, taken = answer.waiting, answer.take()
        assert (waiting, answer.waiting) == (len(taken), 0)
        body += taken
    return Read(
        answer.status,
        tuple(answer.headers),
        body,
        begun=answer.begun,
        complete=answer.complete,
        surplus=answer.surplus,
        persistent=answer.persistent,
    )


def halves(data: bytes) -> list[tuple[bytes, bytes]]:
    """Part the bytes in two at every border."""
    return [(data[:border], data[border:]) for border in range(1, len(data))]


def single(data: bytes) -> list[bytes]:
    """Part the bytes everywhere."""
    return [data[place : place + 1] for place in range(len(data))]


def whole(status: int, headers: Headers, body: bytes, *, persistent: bool = True, surplus: bool = False) -> Read:
    """Give what is known of a complete answer."""
    return Read(
        status, tuple(headers), body, begun=True, complete=True, surplus=surplus, persistent=persistent
    )  # fmt: skip


LENGTH = (b"content-length", b"5")
CODING = (b"transfer-encoding", b"chunked")

GOOD: dict[str, tuple[bytes, Read]] = {
    "a length": (WHOLE, whole(200, [LENGTH], b"hello")),
    "an empty body": (OK + b"Content-Length: 0\r\n\r\n", whole(200, [(b"content-length", b"0")], b"")),
    "leading zeros": (OK + b"Content-Length: 005\r\n\r\nhello", whole(200, [(b"content-length", b"005")], b"hello")),
    "no reason": (b"HTTP/1.1 200\r\nContent-Length: 5\r\n\r\nhello", whole(200, [LENGTH], b"hello")),
    "an empty reason": (b"HTTP/1.1 200 \r\nContent-Length: 5\r\n\r\nhello", whole(200, [LENGTH], b"hello")),
    "an error": (b"HTTP/1.1 599 Odd\r\nContent-Length: 5\r\n\r\nhello", whole(599, [LENGTH], b"hello")),
    "upper case": (
        OK + b"CONTENT-LENGTH: 5\r\nX-A: VaLuE\r\n\r\nhello",
        whole(200, [LENGTH, (b"x-a", b"VaLuE")], b"hello"),
    ),
    "lower case": (OK + b"content-length:5\r\n\r\nhello", whole(200, [LENGTH], b"hello")),
    "order and duplicates": (
        OK + b"B: 1\r\nA: 2\r\nContent-Length: 5\r\nB: 3\r\n\r\nhello",
        whole(200, [(b"b", b"1"), (b"a", b"2"), LENGTH, (b"b", b"3")], b"hello"),
    ),
    "an empty value": (OK + b"X-E:\r\nContent-Length: 5\r\n\r\nhello", whole(200, [(b"x-e", b""), LENGTH], b"hello")),
    "a value beyond ASCII": (
        OK + b"X-E: \xc3\xa9\xff\r\nContent-Length: 5\r\n\r\nhello",
        whole(200, [(b"x-e", b"\xc3\xa9\xff"), LENGTH], b"hello"),
    ),
    "one that will close": (
        OK + b"Connection: close\r\nContent-Length: 5\r\n\r\nhello",
        whole(200, [(b"connection", b"close"), LENGTH], b"hello", persistent=False),
    ),
    "an old one": (
        b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        whole(200, [LENGTH], b"hello", persistent=False),
    ),
    "chunks": (
        CHUNKED + b"5\r\nhello\r\n1\r\n \r\n00A\r\nbig\r\nworld\r\n0\r\n\r\n",
        whole(200, [CODING], b"hello big\r\nworld"),
    ),
    "no chunks": (CHUNKED + b"0\r\n\r\n", whole(200, [CODING], b"")),
    "a coding in capitals": (
        OK + b"Transfer-Encoding: CHUNKED\r\n\r\n1\r\nx\r\n0\r\n\r\n",
        whole(200, [(b"transfer-encoding", b"CHUNKED")], b"x"),
    ),
    "chunk extensions": (
        CHUNKED + b'5;a=b;c="d;e"\r\nhello\r\n0;last\r\n\r\n',
        whole(200, [CODING], b"hello"),
    ),
    "a hint before": (
        b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + WHOLE,
        whole(200, [LENGTH], b"hello"),
    ),
    "two continues before": (b"HTTP/1.1 100 Continue\r\n\r\n" * 2 + WHOLE, whole(200, [LENGTH], b"hello")),
    "nothing": (b"HTTP/1.1 204 No Content\r\n\r\n", whole(204, [], b"")),
    "not modified": (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", whole(304, [LENGTH], b"")),
    "bytes of every value": (
        OK + b"Content-Length: 256\r\n\r\n" + bytes(range(256)),
        whole(200, [(b"content-length", b"256")], bytes(range(256))),
    ),
}
SURPLUS: dict[str, tuple[bytes, Read]] = {
    "two answers": (WHOLE + WHOLE, whole(200, [LENGTH], b"hello", surplus=True)),
    "a byte too many": (WHOLE + b"!", whole(200, [LENGTH], b"hello", surplus=True)),
    "a byte after chunks": (
        CHUNKED + b"5\r\nhello\r\n0\r\n\r\n!",
        whole(200, [CODING], b"hello", surplus=True),
    ),
    "a byte after the last answer": (
        OK + b"Connection: close\r\nContent-Length: 5\r\n\r\nhello!",
        whole(200, [(b"connection", b"close"), LENGTH], b"hello", persistent=False, surplus=True),
    ),
    "a 204 with a body": (
        b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\nhello",
        whole(204, [LENGTH], b"", surplus=True),
    ),
    "a 204 with chunks": (
        b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n",
        whole(204, [CODING], b"", surplus=True),
    ),
    "a 304 with a body": (
        b"HTTP/1.1 304 Not Modified\r\nContent-Length: 1\r\n\r\nx",
        whole(304, [(b"content-length", b"1")], b"", surplus=True),
    ),
    "garbage": (WHOLE + b"\x00\xff\r\n\r\n", whole(200, [LENGTH], b"hello", surplus=True)),
}
BAD: dict[str, bytes] = {
    "garbage": b"\x16\x03\x01\x00\xa5",
    "a request": b"GET / HTTP/1.1\r\n\r\n",
    "another protocol": b"SSH-2.0-OpenSSH\r\n",
    "a protocol switch": b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
    "a bare protocol switch": b"HTTP/1.1 101 Switching\r\n\r\n",
    "a short status": b"HTTP/1.1 20 OK\r\n\r\n",
    "a long status": b"HTTP/1.1 2000 OK\r\n\r\n",
    "a status of letters": b"HTTP/1.1 2x0 OK\r\n\r\n",
    "a version to come": b"HTTP/3.7 200 OK\r\n\r\n",
    "its end by closing": OK + b"\r\nhello",
    "its end by closing, said": OK + b"Connection: close\r\n\r\nhello",
    "the same length twice": OK + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
    "two lengths": OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
    "a list of lengths": OK + b"Content-Length: 5, 5\r\n\r\nhello",
    "an empty length": OK + b"Content-Length:\r\n\r\nhello",
    "a signed length": OK + b"Content-Length: +5\r\n\r\nhello",
    "a negative length": OK + b"Content-Length: -5\r\n\r\nhello",
    "a hexadecimal length": OK + b"Content-Length: 0x5\r\n\r\nhello",
    "a length beyond counting": OK + b"Content-Length: 99999999999999999999\r\n\r\nhello",
    "a length, then chunks": OK + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks, then a length": OK + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "another coding": OK + b"Transfer-Encoding: gzip\r\n\r\nhello",
    "a coding before": OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "a coding after": OK + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    "chunked twice": OK + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "nearly chunked": OK + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "identity": OK + b"Transfer-Encoding: identity\r\nContent-Length: 5\r\n\r\nhello",
    "a folded value": OK + b"X-A: b\r\n c\r\nContent-Length: 5\r\n\r\nhello",
    "a folded length": OK + b"Content-Length:\r\n 5\r\n\r\nhello",
    "a folded coding": OK + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    "a NUL in a value": OK + b"X-A: b\x00c\r\nContent-Length: 5\r\n\r\nhello",
    "a NUL in a name": OK + b"X\x00A: b\r\nContent-Length: 5\r\n\r\nhello",
    "a return in a value": OK + b"X-A: b\rc\r\nContent-Length: 5\r\n\r\nhello",
    "a line feed alone": OK + b"X-A: b\nContent-Length: 5\r\n\r\nhello",
    "only line feeds": b"HTTP/1.1 200 OK\nContent-Length: 5\n\nhello",
    "a control in a value": OK + b"X-A: \x01\r\nContent-Length: 5\r\n\r\nhello",
    "a space before the colon": OK + b"Content-Length : 5\r\n\r\nhello",
    "a space before the name": OK + b" Content-Length: 5\r\n\r\nhello",
    "no name": OK + b": 5\r\nContent-Length: 5\r\n\r\nhello",
    "no colon": OK + b"Content-Length\r\n\r\nhello",
    "a hint with a body": b"HTTP/1.1 103 Hints\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n" + WHOLE,
}
BAD_CHUNKS: dict[str, bytes] = {
    "no digit": b"g\r\nhello\r\n0\r\n\r\n",
    "no size": b"\r\nhello\r\n0\r\n\r\n",
    "a sign": b"-5\r\nhello\r\n0\r\n\r\n",
    "a prefix": b"0x5\r\nhello\r\n0\r\n\r\n",
    "a space before": b" 5\r\nhello\r\n0\r\n\r\n",
    "a space after": b"5 \r\nhello\r\n0\r\n\r\n",
    "a size beyond counting": b"fffffffffffffffff\r\nhello\r\n0\r\n\r\n",
    "more than its size": b"4\r\nhello\r\n0\r\n\r\n",
    "less than its size": b"6\r\nhello\r\n0\r\n\r\n",
    "line feeds": b"5\nhello\n0\n\n",
    "a size that is the end and is not": b"00g\r\n\r\n",
}


@pytest.mark.parametrize("name", [*GOOD, *SURPLUS])
def test_an_answer_is_read(name: str) -> None:
    """Head, body, completeness, persistence and what came after the end are told of each answer."""
    data, known = (GOOD | SURPLUS)[name]

    assert read(data) == known


@pytest.mark.parametrize("name", [*GOOD, *SURPLUS])
def test_it_does_not_matter_where_an_answer_was_parted(name: str) -> None:
    """An answer that arrives in two parts, at whatever border, or byte by byte, is the same answer."""
    data, known = (GOOD | SURPLUS)[name]

    for parts in (*halves(data), single(data)):
        assert read(*parts) == known, parts


@given(st.sampled_from([*GOOD, *SURPLUS]), st.data())
def test_it_does_not_matter_how_often_an_answer_was_parted(name: str, choices: st.DataObject) -> None:
    """Nor does it when it arrives in any number of parts of any size."""
    data, known = (GOOD | SURPLUS)[name]
    borders = choices.draw(st.lists(st.integers(1, len(data) - 1), unique=True, max_size=12).map(sorted))

    parts = [data[start:end] for start, end in zip([0, *borders], [*borders, len(data)], strict=True)]

    assert read(*parts) == known


@pytest.mark.parametrize("name", GOOD)
def test_an_answer_that_is_cut_is_not_complete(name: str) -> None:
    """Every proper beginning of an answer is known to be a beginning, and its body to be a part."""
    data, known = GOOD[name]

    for cut, _ in halves(data):
        before = read(cut)
        assert not before.complete
        assert known.body.startswith(before.body)
        assert not before.surplus


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_answer_is_refused(name: str) -> None:
    """A departure from the rules is refused, however it arrives, before anything of it counts as an answer."""
    data = BAD[name]

    for parts in ([data], *halves(data), single(data)):
        answer = Answer()
        with pytest.raises(UpstreamMalformed):
            feed(answer, parts)
        assert not answer.begun
        assert not answer.complete
        assert answer.take() == b""


@pytest.mark.parametrize(
    ("name", "reason"),
    [("its end by closing", "neither one length nor chunks"), ("a folded value", "HttpParserError")],
)
def test_a_refusal_has_a_reason_for_the_log(name: str, reason: str) -> None:
    """An operator learns whether the framing was refused by us or the syntax by the parser."""
    with pytest.raises(UpstreamMalformed) as refused:
        read(BAD[name])

    assert refused.value.reason == reason


@pytest.mark.parametrize("name", BAD_CHUNKS)
def test_bad_chunks_are_refused(name: str) -> None:
    """A body whose chunks break the rules is never complete; what came before stays readable."""
    data = CHUNKED + b"3\r\nabc\r\n" + BAD_CHUNKS[name]

    for parts in ([data], *halves(data), single(data)):
        answer = Answer()
        with pytest.raises(UpstreamMalformed):
            feed(answer, parts)
        assert answer.begun
        assert not answer.complete
        assert answer.take().startswith(b"abc")


@given(
    st.lists(
        st.binary(max_size=20)
        | st.sampled_from([*BAD.values(), OK, b"\r\n", b"5\r\n", b"0\r\n\r\n", b"Content-Length: 3"])
    )
)
def test_any_bytes_are_read_or_refused(parts: list[bytes]) -> None:
    """No bytes make the reading fail in another way, and only a framed answer of HTTP's statuses begins."""
    answer = Answer()

    with suppress(UpstreamMalformed):
        feed(answer, parts)

    assert not answer.complete or answer.begun
    assert not answer.begun or is_framed(answer.status, answer.headers)


@given(st.sampled_from([*GOOD, *SURPLUS]), st.data())
def test_any_changed_byte_is_read_or_refused(name: str, choices: st.DataObject) -> None:
    """An answer with bytes changed means the same in one part as in many, or is refused in both."""
    data = bytearray((GOOD | SURPLUS)[name][0])
    for _ in range(choices.draw(st.integers(1, 3))):
        data[choices.draw(st.integers(0, len(data) - 1))] = choices.draw(st.integers(0, 255))

    outcomes = [_outcome([bytes(data)]), _outcome(single(bytes(data)))]

    assert outcomes[0] == outcomes[1]


def _outcome(parts: list[bytes]) -> tuple[object, ...]:
    answer = Answer()
    try:
        feed(answer, parts)
    except UpstreamMalformed:
        return (answer.begun, answer.complete, answer.take())
    # A blank line after the end is nobody's, and llhttp passes over it when it comes with the end.
    return (answer.begun, answer.status, answer.complete, answer.persistent, answer.take())


def feed(answer: Answer, parts: list[bytes] | tuple[bytes, ...]) -> None:
    """Feed all the parts."""
    for part in parts:
        answer.feed(part)


@pytest.mark.parametrize("status", [b"000", b"099", b"600", b"999"])
def test_a_status_outside_http_is_refused(status: bytes) -> None:
    """RFC 9110 §15 knows 100 to 599; what lies outside is neither informational nor final."""
    data = b"HTTP/1.1 " + status + b" Odd\r\nContent-Length: 3\r\n\r\nabc"

    with pytest.raises(UpstreamMalformed):
        read(data)


def test_an_odd_answer_adds_nothing_to_the_next() -> None:
    """The body of an answer below 100 never becomes the beginning of another's."""
    answer = Answer()
    with pytest.raises(UpstreamMalformed):
        answer.feed(b"HTTP/1.1 099 Odd\r\nContent-Length: 3\r\n\r\nabc" + WHOLE)

    assert answer.take() == b""


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/0.9 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/2.0 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    ],
    ids=["0.9", "2.0", "1.0 with chunks"],
)
def test_another_version_is_refused(data: bytes) -> None:
    """Only HTTP/1.0 and 1.1 have this form, and 1.0 has no chunks: its framing is faulty (RFC 9112 §6.1)."""
    with pytest.raises(UpstreamMalformed):
        read(data)


@pytest.mark.parametrize("border", [None, "byte by byte"])
def test_trailers_are_not_header_fields(border: str | None) -> None:
    """A field after the chunks is dropped, whenever it arrives (RFC 9110 §6.5.1)."""
    data = CHUNKED + b"5\r\nhello\r\n0\r\nX-Trailer: 1\r\nSet-Cookie: a=b\r\n\r\n"

    known = read(*([data] if border is None else single(data)))

    assert known == whole(200, [CODING], b"hello")


@pytest.mark.parametrize("space", [b" ", b"\t", b" \t "])
def test_space_after_a_value_is_no_part_of_it(space: bytes) -> None:
    """Optional whitespace is taken off before a value means anything (RFC 9110 §5.5)."""
    data = OK + b"X-A:" + space + b"b" + space + b"\r\nContent-Length:" + space + b"5" + space + b"\r\n\r\nhello"

    known = read(data)

    assert known == whole(200, [(b"x-a", b"b"), LENGTH], b"hello")


def test_a_head_within_the_limit_is_read() -> None:
    """A head of the greatest length is read like any other."""
    start, end = OK + b"X-A: ", b"\r\nContent-Length: 5\r\n\r\n"
    value = b"a" * (MAX_HEAD_BYTES - len(start + end))

    known = read(start, value, end, b"hello")

    assert known == whole(200, [(b"x-a", value), LENGTH], b"hello")
    with pytest.raises(UpstreamMalformed, match="cannot be read"):
        read(start, value + b"a" * len(end), b"a")


@pytest.mark.parametrize(
    "parts",
    [
        [OK, b"X-A: ", *[b"a" * 10_000] * 7],
        [OK, *[b"X-A: b\r\n"] * 8200],
        [b"HTTP/1.1 200 " + b"K" * MAX_HEAD_BYTES],
        [b"HTTP/1.1 100 Continue\r\n\r\n"] * 3000,
        [b"\r\n" * 1000] * 33,
    ],
    ids=["one value", "many fields", "a reason", "many hints", "blank lines"],
)
def test_a_head_without_end_is_refused(parts: list[bytes]) -> None:
    """Whatever a head is made longer with, it is given up within the limit."""
    answer = Answer()

    with pytest.raises(UpstreamMalformed) as refused:
        feed(answer, parts)

    assert refused.value.reason == "the head is too long"


def test_a_head_is_too_long_even_at_once() -> None:
    """A head over the limit is refused also when its end comes with its beginning."""
    data = OK + b"X-A: " + b"a" * MAX_HEAD_BYTES + b"\r\nContent-Length: 5\r\n\r\nhello"

    with pytest.raises(UpstreamMalformed):
        read(data)


def test_a_long_body_does_not_count_as_head() -> None:
    """The limit is of the head; a body that comes with it may be as long as it likes."""
    body = b"b" * (2 * MAX_HEAD_BYTES)

    known = read(OK + b"Content-Length: %d\r\n\r\n" % len(body) + body)

    assert known.complete
    assert known.body == body


def test_nothing_is_read_after_the_end() -> None:
    """Whatever comes after the end changes nothing but that it came."""
    answer = Answer()
    answer.feed(WHOLE)

    answer.feed(OK + b"Content-Length: 3\r\n\r\nbad")

    assert answer.surplus
    assert answer.headers == [LENGTH]
    assert answer.take() == b"hello"


@pytest.mark.parametrize("extra", [b"\r\n", b"\r", b"HTTP/1.1 200 OK\r\n"])
def test_any_byte_after_the_end_is_surplus(extra: bytes) -> None:
    """A connection that sends more, though it be a blank line, is told from one that does not."""
    known = read(WHOLE, extra)

    assert known == whole(200, [LENGTH], b"hello", surplus=True)


def test_nothing_is_known_of_an_answer_before_its_bytes() -> None:
    """An answer of which nothing came has no status, and its connection is not to be kept."""
    assert read() == read(b"") == Read(0, (), b"", begun=False, complete=False, surplus=False, persistent=False)


def test_what_waits_is_counted_and_given_once() -> None:
    """Bytes of body wait together, in order, until they are taken; then they are gone."""
    answer = Answer()
    for part in (CHUNKED, b"2\r\nhe\r\n", b"3\r\nllo\r\n"):
        answer.feed(part)

    waiting, first, second = answer.waiting, answer.take(), answer.take()

    assert (waiting, first, second) == (5, b"hello", b"")


def test_an_upgrade_that_is_offered_is_not_taken() -> None:
    """A final answer that names an upgrade is an answer like any other (RFC 9110 §7.8)."""
    data = OK + b"Upgrade: h2c\r\nConnection: upgrade\r\nContent-Length: 5\r\n\r\nhello"

    known = read(data)

    assert known.complete
    assert known.body == b"hello"


@pytest.mark.parametrize(
    ("status", "headers", "framed"),
    [
        (200, [], False),
        (204, [], True),
        (304, [], True),
        (205, [], False),
        (200, [(b"content-length", b"0")], True),
        (200, [(b"content-length", b"")], False),
        (200, [(b"content-length", b"-1")], False),
        (200, [(b"content-length", b"1"), (b"content-length", b"1")], False),
        (200, [(b"transfer-encoding", b"ChunKed")], True),
        (200, [(b"transfer-encoding", b"chunked"), (b"transfer-encoding", b"chunked")], False),
        (200, [(b"transfer-encoding", b"chunked"), (b"content-length", b"1")], False),
        (204, [(b"transfer-encoding", b"chunked"), (b"content-length", b"1")], False),
        (200, [(b"transfer-encoding", b"gzip")], False),
        (204, [(b"transfer-encoding", b"gzip")], False),
    ],
)
def test_framing_is_one_length_or_chunks(status: int, headers: Headers, framed: bool) -> None:
    """An end that only a closed connection could tell is none."""
    assert is_framed(status, headers) is framed
