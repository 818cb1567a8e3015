"""Whether a principal may perform an operation; a permit is the proof, and only this room makes one.

Pure: reads values, performs nothing.
"""

from dataclasses import dataclass
from typing import Final

from proxy.errors import ScopeMissing
from proxy.model import Principal
from proxy.operations import Operation

_SEAL: Final = object()


@dataclass(frozen=True, slots=True)
class Permit:
    """Proof that `principal` may perform `operation`. Without the seal it cannot be made elsewhere."""

    principal: Principal
    operation: Operation
    seal: object

    def __post_init__(self) -> None:
        if self.seal is not _SEAL:
            raise TypeError("only proxy.authorization.authorize makes permits")


def authorize(principal: Principal, operation: Operation) -> Permit:
    """Permit the operation, or raise ScopeMissing (RFC 6750 §3.1)."""
    if operation.scope not in principal.scopes:
        raise ScopeMissing(operation.scope)
    return Permit(principal, operation, _SEAL)
