"""A body that is wrong in many places costs no more than one that is wrong in one."""

import pytest

from proxy.errors import BodyInvalid
from proxy.tenancy import RunBody, RunRules, bind_run

RULES = RunRules(allow_system=False, max_recursion=50, standing_thread=False)


def test_a_million_wrong_messages_are_told_by_the_first() -> None:
    """Validation stops at the first message that is none."""
    raw = b'{"messages":[' + b",".join([b"0"] * 500_000) + b"]}"

    with pytest.raises(BodyInvalid) as refused:
        bind_run(raw, tag="t" * 16, rules=RULES, new_name=lambda: "n")

    assert refused.value.detail.count("messages") == 1


def test_many_unknown_members_are_counted() -> None:
    """Not one fault a member."""
    raw = ("{" + ",".join(f'"k{number}":0' for number in range(100_000)) + "}").encode()

    with pytest.raises(BodyInvalid) as refused:
        bind_run(raw, tag="t" * 16, rules=RULES, new_name=lambda: "n")

    assert refused.value.detail == "unknown members: 100000 of them."


def test_the_list_of_messages_fails_fast() -> None:
    """The mark that bounds the work is there."""
    assert any(type(mark).__name__ == "FailFast" for mark in RunBody.model_fields["messages"].metadata)
