"""Ends a client's connection: between two requests so that the next one is not lost, and when it does not get closed.

Knows neither requests nor answers.
"""

import asyncio
import ctypes
import select
from contextlib import suppress
from fcntl import ioctl
from functools import cache
from termios import TIOCOUTQ
from typing import Final

_UNSPECIFIED: Final = bytes(16)
"""An address of no family: to connect to it dissolves a connection at once (connect(2))."""


class Leaving:
    """A part of a protocol: gives up a connection that does not get closed."""

    transport: asyncio.Transport
    _was_closing = False

    def give_up_closing(self) -> None:
        """Abort a connection that was closing already when this was called before: its client does not read.

        A closed transport waits for its client to take what was written, and holds a descriptor for as long.
        """
        if self.transport.is_closing():
            if self._was_closing:
                self.transport.abort()
            self._was_closing = True


def end_idle(transport: asyncio.Transport) -> None:
    """End a connection unless the next request is here already, not yet read; half a head is none.

    nginx sends no run twice: where it has still to notice an ordinary end, and sends the next request there, that costs
    the caller a 502. A reset it finds before it sends anything, and goes elsewhere. Only whose
    system has not yet acknowledged all of the last answer meets an ordinary end: a reset would discard the rest.
    """
    if transport.is_closing():  # perhaps its descriptor is another's by now
        return
    descriptor = transport.get_extra_info("socket").fileno()
    if _has_come(descriptor):
        return
    if not transport.get_write_buffer_size() and _is_delivered(descriptor):
        # Now: to close takes the loop another turn, in which a request could come that nobody reads.
        _libc().connect(descriptor, _UNSPECIFIED, len(_UNSPECIFIED))
    transport.close()


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _has_come(descriptor: int) -> bool:
    """Say whether there is something to read."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


def _is_delivered(descriptor: int) -> bool:
    """Say whether the other side has all that was written: SIOCOUTQ of tcp(7)."""
    waiting = bytearray(4)
    with suppress(OSError):
        ioctl(descriptor, TIOCOUTQ, waiting)
        return not any(waiting)
    return False
