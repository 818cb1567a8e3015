"""A name server, as Docker's is: it gives the addresses of a service that are there at the moment.

It speaks as much of DNS (RFC 1035) as nginx asks for: A records of one name, and no other truth.
"""

import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

LIFE = 1
"""Seconds for which an answer may be kept; nginx's `valid=` overrules it."""


@dataclass(slots=True)
class Names:
    """A running name server; `addresses` are what is answered from now on, by name."""

    address: str
    addresses: dict[str, Sequence[str]] = field(default_factory=dict)
    asked: Counter[str] = field(default_factory=Counter)
    """How often, by name."""

    def answer(self, question: bytes) -> bytes:
        """Answer one datagram: the addresses, or that there is no such name."""
        labels, position = [], 12
        while length := question[position]:
            labels.append(question[position + 1 : position + 1 + length].decode())
            position += 1 + length
        name = ".".join(labels)
        self.asked[name] += 1
        found = self.addresses.get(name, ()) if question[position + 1 : position + 3] == b"\0\1" else ()
        flags = 0x8180 if found else 0x8183
        head = question[:2] + struct.pack(">HHHHH", flags, 1, len(found), 0, 0)
        records = [struct.pack(">HHHIH", 0xC00C, 1, 1, LIFE, 4) + socket.inet_aton(address) for address in found]
        return head + question[12 : position + 5] + b"".join(records)


@contextmanager
def running_names() -> Iterator[Names]:
    """Serve until the block ends."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as wire:
        wire.bind(("127.0.0.1", 0))
        port = wire.getsockname()[1]
        names = Names(f"127.0.0.1:{port}")

        def serve() -> None:
            while True:
                question, asker = wire.recvfrom(512)
                if not question:
                    return
                wire.sendto(names.answer(question), asker)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield names
        finally:
            wire.sendto(b"", ("127.0.0.1", port))
            thread.join()
