"""JSON too long to be held: its outline, made as it comes, in which long strings are told by their lengths.

Pure. Holds 64 KiB and one read at most, whatever comes and however it is parted; never says that JSON is bad.
"""

import re
from collections.abc import Callable
from typing import Final

HELD_BYTES: Final = 65_536
_LONG: Final = 256
"""A longer string has no place in an outline."""
_STRING: Final = re.compile(rb'"((?:[^"\\]++|\\.)*+)("|\\?\Z)', re.DOTALL)
_REST: Final = re.compile(rb"(?:[^\"\\]++|\\.)*+", re.DOTALL)


def told_bytes(text: str) -> int | None:
    """Give the bytes of the long string that `text` stands for in an outline; None when it is itself."""
    return int(text[1:]) if text.startswith("\0") and text[1:].isdecimal() and len(text) < _LONG else None


class Outline:
    """JSON as it comes, up to 64 KiB of it; of more than that an outline, without what long strings say.

    A long string becomes its own length after a NUL. `only` says, of the first bytes, whether an outline is wanted.
    """

    def __init__(self, only: Callable[[bytes], bool] = lambda _: True) -> None:
        self.held = bytearray()
        self.outlined = False
        self.beyond = 0
        """Bytes that had no room in the outline either."""
        self._only = only
        self._carried = b""
        """The beginning of a short string, or a backslash, that the last bytes ended with."""
        self._inside: int | None = None
        """Bytes so far of the long string that the last bytes ended in."""

    def feed(self, chunk: bytes) -> None:
        """Take in more."""
        if not self.outlined:
            if len(self.held) + len(chunk) <= HELD_BYTES:
                self.held += chunk
                return
            self.outlined = True
            chunk = bytes(self.held) + chunk
            self.held.clear()
            if not self._only(chunk):
                self.held += chunk[:_LONG]
                self.beyond = 1
        if not self.beyond:
            self._shorten(self._carried + chunk)
        else:
            self.beyond += len(chunk)

    def _shorten(self, chunk: bytes) -> None:
        self._carried = b""
        if self._inside is not None:
            rest = _REST.match(chunk)
            end = rest.end() if rest is not None else 0
            self._inside += end
            if not chunk.startswith(b'"', end):
                self._carried = chunk[end:]
                return
            self.held += b'"\\u0000%d"' % self._inside
            self._inside = None
            chunk = chunk[end + 1 :]
        self.held += _STRING.sub(self._shortened, chunk)
        if len(self.held) > HELD_BYTES:
            self.beyond = 1

    def _shortened(self, string: re.Match[bytes]) -> bytes:
        text, end = string.groups()
        if end == b'"':
            return string[0] if len(text) <= _LONG else b'"\\u0000%d"' % len(text)
        if len(text) <= _LONG:
            self._carried = string[0]
        else:
            self._inside, self._carried = len(text), end
        return b""
