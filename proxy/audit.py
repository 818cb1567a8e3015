"""Who was let in with what, and who was not: one event for each thing that somebody may have to answer for.

Writes JSON lines to a logger of its own; never a credential, and of its text nothing that a terminal would obey.
"""

import logging
from collections import OrderedDict
from typing import Final

from proxy.failures import address_partition
from proxy.model import CredentialKind, Principal, Record

log: Final = logging.getLogger("agentflow_proxy.audit")
MOST_ADDRESSES: Final = 10_000


class Audit:
    """The events of one serving process. Where keys came from, and whom it told of lately, it remembers of so many."""

    def __init__(self, most: int = MOST_ADDRESSES) -> None:
        self._most = most
        self._addresses: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._told: OrderedDict[tuple[str, str], None] = OrderedDict()

    def note_use(self, principal: Principal, record: Record) -> None:
        """Tell when this process sees a key used from an address, or a network of IPv6, for the first time."""
        pair = (principal.key_id, address_partition(record.address))
        if pair in self._addresses:
            self._addresses.move_to_end(pair)
            return
        self._remember(self._addresses, pair)
        write("key.used_from_new_address", key_id=principal.key_id, name=principal.name, **_where(record))

    def note_refusal(self, kind: CredentialKind, record: Record, *, reason: str, key_id: str = "") -> None:
        """Tell why a key or a token was refused; the caller is never told."""
        named = {"key_id": key_id} if key_id else {}
        event = "key.refused" if kind is CredentialKind.API_KEY else "token.refused"
        write(event, reason=reason, **named, **_where(record))

    def note_unreadable(self, record: Record, *, reason: str) -> None:
        """Tell why nobody knows what was presented: it was no credential, or two."""
        write("credential.refused", reason=reason, **_where(record))

    def note_delegation_refusal(self, principal: Principal, record: Record, *, reason: str) -> None:
        """Tell that a caller may not act for another; once a minute of one caller at one address.

        He is proven, so that no failures run out which would bound the lines.
        """
        pair = (f"{int(record.started // 60)} {principal.namespace}", address_partition(record.address))
        if pair in self._told:
            return
        self._remember(self._told, pair)
        named = {"key_id": principal.key_id} if principal.key_id else {}
        write("delegation.refused", reason=reason, name=principal.name, **named, **_where(record))

    def _remember(self, pairs: OrderedDict[tuple[str, str], None], pair: tuple[str, str]) -> None:
        pairs[pair] = None
        if len(pairs) > self._most:
            pairs.popitem(last=False)


def write(event: str, **fields: str | int | list[str] | None) -> None:
    """Write one event."""
    log.info(event, extra={"fields": fields})


def _where(record: Record) -> dict[str, str]:
    return {"address": record.address, "request_id": record.request_id.decode()}
