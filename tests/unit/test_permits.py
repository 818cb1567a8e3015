"""Permits: made for a scope that is held, and nowhere else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.authorization import Permit, authorize
from proxy.errors import ScopeMissing
from proxy.model import CredentialKind, Principal
from proxy.operations import OPERATIONS, SCOPES, Operation


def principal(*scopes: str) -> Principal:
    """Make a principal that holds `scopes`."""
    return Principal("alice", "alice", "jwt:0::alice", frozenset(scopes), CredentialKind.JWT)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda row: f"{row.method} {row.path}")
def test_the_scope_of_the_row_is_enough(operation: Operation) -> None:
    """Who holds an operation's scope, and no other, may perform it."""
    caller = principal(operation.scope)

    permit = authorize(caller, operation)

    assert (permit.principal, permit.operation) == (caller, operation)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda row: f"{row.method} {row.path}")
def test_every_other_scope_is_not(operation: Operation) -> None:
    """Who holds all scopes but an operation's own may not perform it, and is told which is missing."""
    caller = principal(*(SCOPES - {operation.scope}), operation.scope.upper(), operation.scope + " ", "*", "agent:*")

    with pytest.raises(ScopeMissing) as refused:
        authorize(caller, operation)

    assert refused.value.scope == operation.scope


@given(st.frozensets(st.sampled_from(sorted(SCOPES))), st.sampled_from(OPERATIONS))
def test_a_permit_means_the_scope_is_held(scopes: frozenset[str], operation: Operation) -> None:
    """There is a permit exactly when the scope is among those of the principal."""
    try:
        authorize(principal(*scopes), operation)
    except ScopeMissing:
        permitted = False
    else:
        permitted = True

    assert permitted == (operation.scope in scopes)


@pytest.mark.parametrize("seal", [None, object(), "seal"])
def test_a_permit_cannot_be_made_elsewhere(seal: object) -> None:
    """Without the seal there is no permit, so that nothing is forwarded unauthorized by mistake."""
    with pytest.raises(TypeError, match="only proxy"):
        Permit(principal(*SCOPES), OPERATIONS[0], seal)


def test_a_permit_cannot_be_changed() -> None:
    """What was permitted stays what it was."""
    permit = authorize(principal(*SCOPES), OPERATIONS[0])

    with pytest.raises(AttributeError):
        permit.operation = OPERATIONS[1]  # type: ignore[misc]
