"""The sum of what a run's messages used: each counted once, however often and in however many pieces it comes.

Pure. What nobody reported is estimated from the bytes of text, four a token, and marked so.
"""

from collections import OrderedDict
from typing import Any, Final

import pydantic_core

from proxy.model import Usage
from proxy.outlines import told_bytes

BYTES_A_TOKEN: Final = 4
_MOST_TOKENS: Final = 1 << 40
"""More than that nobody reports in earnest."""
_MOST_MESSAGES: Final = 128
"""Messages whose usage is remembered, so that one that comes again is not counted again."""
_TEXTS: Final = frozenset({"text", "summary", "details", "args", "output", "transcript", "message"})
"""The fields of a content block that a model reads or writes; media are not among them."""

type _Sum = tuple[int, int, int, int]


class Tally:
    """The sum over a run's messages, each counted once, however often it comes."""

    def __init__(self) -> None:
        self.turns = 0
        self._known: OrderedDict[bytes, tuple[Usage, int]] = OrderedDict()
        """By message: what it used, and the bytes of text of the deltas seen, or -1 when it came whole."""
        self._sum: _Sum = (0, 0, 0, 0)
        """Input, output and total tokens, and how many messages were estimated."""
        self._totals: Usage | None = None
        self._passed = 0
        """Bytes of text of whole messages: what the model reads again at its next call, as far as it passed by."""
        self._open: bytes | None = None
        self._open_text = 0

    def add_delta(self, message_id: bytes, text: int) -> None:
        """Take in a piece of a message of the assistant, with so many bytes of text."""
        if message_id != self._open:
            self._settle()
            known = self._known.get(message_id)
            if known is not None and (known[1] < 0 or not known[0].estimated):
                return  # it came whole: a late piece of it says nothing new
            self._open = message_id
            self._open_text = known[1] if known is not None else 0
        self._open_text += text

    def add_message(self, message_id: bytes, message: dict[str, Any]) -> None:
        """Take in a message, of whatever role, whole or not."""
        text, whole = _text_bytes(message), message.get("delta") is not True
        if message.get("role") == "assistant":
            told = reported(message.get("usages"))
            if told is None and not whole:
                self.add_delta(message_id, text)
                return
            if whole:
                self._open = None  # it stands for the deltas before it, whatever id they had
            known = self._known.get(message_id)
            again = known is not None and known[1] < 0
            if told is None and known is not None and (again or not known[0].estimated):
                told = known[0]
            self.turns += whole and not again
            self._put(message_id, told or self._estimate(text), -1 if whole else 0)
            if again:
                return
        if whole:
            self._settle()
            self._passed += text

    def add_context(self, text: int) -> None:
        """Take in so many bytes of text that the model reads at its next call."""
        self._settle()
        self._passed += text

    def add_unread(self, message_id: bytes, text: int) -> None:
        """Take in what looks like messages of the assistant but could not be read."""
        self._put(message_id, self._estimate(text), -1)

    def set_totals(self, data: dict[str, Any]) -> None:
        """Take in the sidecar's own sum over the run."""
        self._totals = reported(data, "total_input_tokens", "total_output_tokens")

    def usage(self) -> Usage | None:
        """Give the sum so far; None while there is nothing to sum."""
        known = self._known.get(self._open) if self._open is not None else None
        now = self._estimate(self._open_text) if self._open is not None else None
        read, written, total, estimates = _moved(self._sum, known[0] if known is not None else None, now)
        if self._totals is not None and self._totals.total_tokens > total:
            return self._totals  # it knows of messages that did not pass by
        something = self._known or self._open is not None
        return Usage(read, written, total, estimated=estimates > 0) if something else None

    def _settle(self) -> None:
        if self._open is not None:
            self._put(self._open, self._estimate(self._open_text), self._open_text)
            self._open = None

    def _estimate(self, text: int) -> Usage:
        read, written = -(-self._passed // BYTES_A_TOKEN), -(-text // BYTES_A_TOKEN)
        return Usage(read, written, read + written, estimated=True)

    def _put(self, message_id: bytes, usage: Usage, text: int) -> None:
        old = self._known.pop(message_id, None)
        self._sum = _moved(self._sum, old[0] if old is not None else None, usage)
        self._known[message_id] = usage, text
        if len(self._known) > _MOST_MESSAGES:
            self._known.popitem(last=False)


def _moved(figures: _Sum, old: Usage | None, new: Usage | None) -> _Sum:
    """Give the sum with `new` in the place of `old`."""
    for usage, sign in ((old, -1), (new, 1)):
        if usage is not None:
            read, written, total, estimates = figures
            figures = (
                read + sign * usage.input_tokens,
                written + sign * usage.output_tokens,
                total + sign * usage.total_tokens,
                estimates + sign * usage.estimated,
            )
    return figures


def reported(value: object, read: str = "prompt_tokens", written: str = "completion_tokens") -> Usage | None:
    """Read reported figures; None where there are none, also when all are 0, which AgentFlow writes for unknown."""
    if not isinstance(value, dict):
        return None
    read_tokens, written_tokens = _count(value.get(read)), _count(value.get(written))
    total = max(_count(value.get("total_tokens")), read_tokens + written_tokens)
    return Usage(read_tokens, written_tokens, total, estimated=False) if total else None


def _count(figure: object) -> int:
    return figure if type(figure) is int and 0 <= figure <= _MOST_TOKENS else 0


def _text_bytes(message: dict[str, Any]) -> int:
    """Count the bytes of text of a message, as JSON writes them."""
    content, reasoning = message.get("content"), message.get("reasoning")
    size = json_bytes(reasoning) if reasoning is not None else 0
    if not isinstance(content, list):
        return size + json_bytes(content) if content is not None else size
    for block in content:
        if isinstance(block, dict):
            for name in block.keys() & _TEXTS:
                if (text := block[name]) is not None:
                    size += json_bytes(text)
    return size


def json_bytes(text: object) -> int:
    """Count the bytes of a text as JSON writes it, which an outline may only tell of."""
    if not isinstance(text, str):
        return len(pydantic_core.to_json(text))
    told = told_bytes(text)
    if told is not None:
        return told
    return len(pydantic_core.to_json(text)) - 2
