"""Revoked tokens and subjects: what a line says, and when a changed file counts."""

import errno
import json
import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.revocations import POLL_SECONDS, RevocationFile, RevocationList, parse_revocations, read_revocations

ISSUER = "https://idp.test"


def covers(text: str, **who: object) -> bool:
    """Ask about a token of Alice's."""
    asked: dict[str, object] = {"issuer": ISSUER, "subject": "alice", "token_id": "t-1", "issued": 100.0}
    return parse_revocations(text).covers(**(asked | who))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("line", "revoked"),
    [
        ("", False),
        ("# nothing\n\n   \n", False),
        ('{"jti": "t-1"}', True),
        ('{"jti": "t-1", "issuer": "https://idp.test"}', True),
        ('{"jti": "t-1", "issuer": "https://other.test"}', False),
        ('{"jti": "t-2"}', False),
        ('{"subject": "alice"}', True),
        ('{"subject": "Alice"}', False),
        ('{"subject": "alice", "issuer": "https://other.test"}', False),
        ('{"subject": "alice", "before": 100.5}', True),
        ('{"subject": "alice", "before": 100}', False),
        ('{"subject": "alice", "before": 1}\n{"subject": "alice", "before": 200}', True),
        ('{"subject": "alice", "before": 200}\n{"subject": "alice", "before": 1}', True),
        ('{"subject": "alice"}\n{"subject": "alice", "before": 1}', True),
    ],
)
def test_a_line_revokes_what_it_names(line: str, revoked: bool) -> None:
    """A token by its id, a subject wholly or before a time, of one issuer or of all; the widest line counts."""
    assert covers(line) is revoked


def test_a_token_without_its_time_counts_as_old() -> None:
    """What does not say when it was issued is before every time; what has no id is no token by id."""
    assert covers('{"subject": "alice", "before": 1}', issued=None)
    assert not covers('{"jti": "t-1"}', token_id=None)


@pytest.mark.parametrize(
    "line",
    ["x", "[]", "{}", '{"jti": 7}', '{"jti": ""}', '{"jti": "a", "subject": "b"}', '{"jti": "a", "before": 1}',
     '{"subject": "a", "before": "1"}', '{"subject": "a", "foo": 1}', '{"subject": "a"} {}',
     '{"subject": "a", "before": NaN}', '{"subject": "a", "before": 1e999}', '{"subject": "a", "subject": "b"}',
     '{"jti": "a", "issuer": "b", "issuer": "c"}'],
)  # fmt: skip
def test_a_line_that_says_something_else_is_a_fault(line: str) -> None:
    """Its number is told, so that it can be found."""
    with pytest.raises(ValueError, match=r"^line 2: "):
        parse_revocations(f"# first\n{line}\n")


def said(text: str) -> object:
    """Give what a text says, or that it is faulty."""
    try:
        return parse_revocations(text)
    except ValueError:
        return "faulty"


WORDS = st.text(st.sampled_from('a\\"u0041 \x00\x1f\x7f\u00e9\ud83d😀{},:'), max_size=6) | st.sampled_from(
    ["a" * 255, "a" * 256]
)


@given(
    members=st.lists(st.tuples(st.sampled_from(["jti", "subject", "issuer", "x"]), WORDS), min_size=1, max_size=3),
    colon=st.sampled_from([": ", ":", ":  "]),
    comma=st.sampled_from([", ", ",", " ,"]),
    raw=st.booleans(),
)
@example(members=[("jti", "\u00e9")], colon=": ", comma=",", raw=False)
@example(members=[("subject", "a\\u0041")], colon=": ", comma=",", raw=True)
@example(members=[("subject", "a"), ("issuer", "\u00e9")], colon=": ", comma=",", raw=False)
def test_the_usual_spelling_means_what_every_other_does(
    members: list[tuple[str, str]], colon: str, comma: str, *, raw: bool
) -> None:
    """Usual lines have a short way: with a space before it, which goes the long way, a line says the same."""
    spelled = [(name, f'"{word}"' if raw else json.dumps(word)) for name, word in members]
    line = "{" + comma.join(f'"{name}"{colon}{value}' for name, value in spelled) + "}"

    assert said(line) == said(f" {line}")


def test_a_changed_file_counts_at_the_next_look(tmp_path: Path) -> None:
    """Asked again within two seconds the file is not looked at; after them it is, and the version says so."""
    now = [0.0]
    file = tmp_path / "revoked"
    file.write_text("")
    revocations = RevocationFile(file, clock=lambda: now[0])

    file.write_text('{"subject": "alice"}\n')
    versions = []
    for now[0] in (POLL_SECONDS - 0.1, POLL_SECONDS, POLL_SECONDS + 1):
        versions.append(revocations.version())

    assert versions == [0, 1, 1]
    assert revocations.covers(issuer=ISSUER, subject="alice", token_id=None, issued=None)


@pytest.mark.parametrize(
    "spoil", [lambda file: file.write_text("{"), os.unlink, lambda file: file.write_bytes(b"\xff")]
)
def test_a_file_that_went_bad_keeps_what_it_said(tmp_path: Path, spoil: object) -> None:
    """Broken, gone or no text: nobody is given back, and the version stays."""
    now = [0.0]
    file = tmp_path / "revoked"
    file.write_text('{"subject": "alice"}\n')
    revocations = RevocationFile(file, clock=lambda: now[0])

    spoil(file)  # type: ignore[operator]
    now[0] = POLL_SECONDS

    assert revocations.version() == 0
    assert revocations.covers(issuer=ISSUER, subject="alice", token_id=None, issued=None)


def test_a_file_is_bounded(tmp_path: Path) -> None:
    """More than 4 MiB is a fault, as is a file that is not there."""
    file = tmp_path / "revoked"
    file.write_bytes(b"#" * ((4 << 20) + 1))

    for path in (file, tmp_path / "absent"):
        with pytest.raises(ValueError, match=r"more than|cannot be read"):
            read_revocations(path)


def test_a_file_that_could_not_be_opened_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A process out of descriptors reads the change once it has one again, though the file stays as it is."""
    now = [0.0]
    file = tmp_path / "revoked"
    file.write_text("")
    revocations = RevocationFile(file, clock=lambda: now[0])

    def exhausted(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    file.write_text('{"subject": "alice"}\n')
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", exhausted)
        for now[0] in (POLL_SECONDS, POLL_SECONDS * 2):
            assert revocations.version() == 0
    now[0] = POLL_SECONDS * 3

    assert revocations.version() == 1
    assert revocations.covers(issuer=ISSUER, subject="alice", token_id=None, issued=None)
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == ["revocations.kept"]


def test_what_is_written_while_the_proxy_starts_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that comes after the first reading is a change, however early it comes."""
    now = [0.0]
    file = tmp_path / "revoked"
    file.write_text("")

    def read_before_the_change(path: Path) -> RevocationList:
        read = read_revocations(path)
        path.write_text('{"subject": "alice"}\n')
        return read

    monkeypatch.setattr("proxy.revocations.read_revocations", read_before_the_change)
    revocations = RevocationFile(file, clock=lambda: now[0])
    now[0] = POLL_SECONDS

    assert revocations.version() == 1
    assert revocations.covers(issuer=ISSUER, subject="alice", token_id=None, issued=None)
