"""The events of a run over AG-UI: they pass as they come, less what the exception of a failed run says.

Pure. The sidecar's events are one line each, `data: {"type":…}`; what was used is read from them in `usage`.
"""

from typing import Any, Final, override

import pydantic_core

from proxy.ends import End
from proxy.framing import MESSAGES, RawLines

_ERROR: Final = b'"RUN_ERROR"'
_ERROR_HEAD: Final = b'data:{"type":"RUN_ERROR"'
_BLANK: Final = b" \t\r"
_LONGEST_HEAD: Final = 64


class AgUiLines(RawLines):
    """The events byte for byte, but for the one of a failed run, whose text may be an exception's."""

    mark = _ERROR

    @override
    def _is_error(self, beginning: bytes) -> bool | None:
        head = beginning[:_LONGEST_HEAD].translate(None, _BLANK)
        if head.startswith(_ERROR_HEAD):
            return self.mark in beginning  # or there are blanks inside of it
        return None if _ERROR_HEAD.startswith(head) and len(beginning) < _LONGEST_HEAD else False

    @override
    def _safe(self, line: bytes) -> bytes:
        errors = self._errors
        errors.run_failed = True
        try:
            value: Any = pydantic_core.from_json(line.removeprefix(b"data:"))
        except ValueError:
            value = {}
        if errors.is_full:
            return line
        errors.note(value, line)
        kept = {name: value[name] for name in ("timestamp", "code") if isinstance(value.get(name), int | str)}
        told = {"type": "RUN_ERROR", "message": MESSAGES[End.UPSTREAM_ERROR], **kept}
        return b"data: " + pydantic_core.to_json(told)
