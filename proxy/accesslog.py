"""The access line: one for every request, refused ones too, written in a few microseconds.

Never shows a credential, a prompt, a body or a query; what a caller wrote is escaped, and cut where it is long.
"""

import json
import logging
import time
from collections.abc import Callable
from json.encoder import encode_basestring_ascii
from typing import Final

from proxy.logs import LineHandler, without_delete
from proxy.model import Headers, Record

access_log: Final = logging.getLogger("agentflow_proxy.access")
LONGEST_PATH: Final = 1024
"""Characters of a path that are shown, in the line and in a problem."""


class AccessLog:
    """Writes the lines. Implements `model.Watcher`. `wall` gives Unix seconds."""

    def __init__(self, wall: Callable[[], float] = time.time) -> None:
        self._wall = wall
        self._second = -1
        self._stamp = ""

    def begin(self, record: Record, headers: Headers) -> None:
        """See `model.Watcher`. Nothing is written before the end."""

    def end(self, record: Record, now: float) -> None:
        """See `model.Watcher`."""
        if not access_log.isEnabledFor(logging.INFO):
            return
        line = self._line(record, now)
        handlers = logging.getLogger().handlers
        if len(handlers) == 1 and isinstance(handlers[0], LineHandler) and not access_log.handlers:
            handlers[0].write(line)
        else:  # an application that serves ours has a logging of its own
            fields = json.loads(line)
            access_log.info(fields["event"], extra={"fields": dict(list(fields.items())[3:])})

    def _line(self, record: Record, now: float) -> str:
        # A template rather than json.dumps of a dict: a twelfth of its cost, and each request pays it.
        quoted = encode_basestring_ascii
        principal = record.principal
        if principal is None:
            caller = '"principal":null,"credential":null'
        else:
            caller = f'"principal":{quoted(principal.name)},"credential":"{principal.kind}"'
        started, first = record.started, record.first_byte_at
        line = (
            f'{{"time":"{self._time()}","level":"info","event":"request.finished",'
            f'"request_id":"{record.request_id.decode()}","client":{quoted(record.address)},{caller},'
            f'"operation":{f'"{record.operation}"' if record.operation else "null"},'
            f'"method":{quoted(record.method) if record.method else "null"},'
            f'"path":{quoted(shortened(record.path)) if record.path else "null"},'
            f'"status":{record.status},"bytes":{record.sent_bytes},"duration_ms":{(now - started) * 1000:.3f},'
            f'"first_byte_ms":{"null" if first is None else f"{(first - started) * 1000:.3f}"},"end":"{record.end}"'
        )
        if principal is not None and principal.on_behalf_of is not None:
            line += f',"on_behalf_of":{quoted(principal.on_behalf_of)}'
        if record.fault:
            line += f',"code":"{record.code}","fault":"{record.fault}","reason":{quoted(record.reason)}'
        return without_delete(line + "}")

    def _time(self) -> str:
        now = self._wall()
        second = int(now)
        if second != self._second:
            self._second = second
            self._stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return f"{self._stamp}.{int((now - second) * 1000):03d}+00:00"


def shortened(path: str) -> str:
    """Give the path, or the beginning of one that is too long to show."""
    return path if len(path) <= LONGEST_PATH else path[:LONGEST_PATH] + "…"
