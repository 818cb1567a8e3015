"""What the audit log remembers, and what it never shows."""

import dataclasses
import io
import json
import logging
from collections.abc import Iterator

import pytest

from proxy import audit
from proxy.audit import Audit
from proxy.logs import JsonFormatter
from proxy.model import CredentialKind, Principal, Record

ALICE = Principal("alice", "alice", "key:A", frozenset(), CredentialKind.API_KEY, key_id="A" * 12)


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """Collect the lines as they would be written."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.setFormatter(JsonFormatter())
    before = audit.log.level
    audit.log.setLevel(logging.INFO)  # which forgets what other tests found disabled
    audit.log.addHandler(handler)
    yield text
    audit.log.removeHandler(handler)
    audit.log.setLevel(before)


def _record(address: str) -> Record:
    return Record(b"id-1", 0.0, address)


def test_an_address_is_new_once(written: io.StringIO) -> None:
    """Each address of each key is told once; addresses of one IPv6 network are one."""
    log = Audit()
    for address in ("192.0.2.1", "192.0.2.2", "192.0.2.1", "2001:db8::1", "2001:db8::2", "2001:db8:1::1"):
        log.note_use(ALICE, _record(address))

    told = [json.loads(line)["address"] for line in written.getvalue().splitlines()]

    assert told == ["192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8:1::1"]


def test_what_is_remembered_is_bounded(written: io.StringIO) -> None:
    """However many addresses a key comes from, so many pairs are kept and no more."""
    log = Audit(most=10)
    for number in range(1000):
        log.note_use(ALICE, _record(f"2001:db8:{number:x}::1"))

    assert len(log._addresses) == 10


def test_an_address_in_use_stays_known(written: io.StringIO) -> None:
    """Neither many hosts of one network nor a row of other addresses makes a busy one new again."""
    log = Audit(most=10)
    for number in range(1000):
        for address in ("192.0.2.1", f"2001:db8::{number:x}", f"2001:db8:1:{number:x}::1"):
            log.note_use(ALICE, _record(address))

    told = [json.loads(line)["address"] for line in written.getvalue().splitlines()]

    assert (told.count("192.0.2.1"), len(told)) == (1, 1002)


def test_who_may_not_act_for_another_is_told_once_a_minute(written: io.StringIO) -> None:
    """However often one caller tries; another caller, another address and the next minute are lines of their own."""
    log, bob = Audit(), dataclasses.replace(ALICE, name="bob", namespace="jwt:0::bob", key_id="")
    tries = [(ALICE, "192.0.2.1", 0.0), (ALICE, "192.0.2.1", 59.9), (bob, "192.0.2.1", 1.0), (ALICE, "192.0.2.2", 1.0)]
    for principal, address, at in [*tries * 50, (ALICE, "192.0.2.1", 60.0)]:
        record = Record(b"id-1", at, address)
        log.note_delegation_refusal(principal, record, reason="scope")

    told = [json.loads(line) for line in written.getvalue().splitlines()]

    assert [(line["name"], line["address"]) for line in told] == [
        ("alice", "192.0.2.1"),
        ("bob", "192.0.2.1"),
        ("alice", "192.0.2.2"),
        ("alice", "192.0.2.1"),
    ]
    assert [line.get("key_id") for line in told] == ["A" * 12, None, "A" * 12, "A" * 12]
    assert {line["event"] for line in told} == {"delegation.refused"}


def test_no_control_character_is_written(written: io.StringIO) -> None:
    """Whatever stands in a field, a terminal that shows the line obeys nothing, and the line is one line."""
    everything = "".join(map(chr, range(0x300))) + "\u2028\u202e\ud800"
    Audit().note_refusal(CredentialKind.JWT, _record("192.0.2.1"), reason=everything)

    line = written.getvalue()

    assert line.removesuffix("\n").isprintable()
    assert line.isascii()
    assert json.loads(line)["reason"] == everything
