"""Where the audit log goes: a file of its own, for its owner alone, or among all other lines.

Knows nothing of what is written there.
"""

import logging
import os
from io import TextIOWrapper
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import override

from proxy import audit
from proxy.environment import SettingsError
from proxy.logs import BackgroundHandler, JsonFormatter


class AuditFile(WatchedFileHandler):
    """A file for its owner alone, also the one that is begun where the last was moved away."""

    @override
    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:  # no new file can be begun: that is no reason to answer nobody
            self.handleError(record)

    @override
    def _open(self) -> TextIOWrapper:
        os.close(os.open(self.baseFilename, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
        return super()._open()


def configure_audit(path: Path | None, *, background: bool = False) -> None:
    """Send the audit log to the file `path`, or where every line goes. Raises SettingsError.

    In the `background` nobody waits until it is written. It is written whatever the level is. The file may be moved
    away at any time; a new one is begun.
    """
    audit.log.setLevel(logging.INFO)
    if path is None:
        return
    try:
        handler = AuditFile(path, encoding="ascii")
    except OSError as error:
        raise SettingsError([f"PROXY_AUDIT_FILE: {path} cannot be written: {error.strerror}"]) from error
    handler.setFormatter(JsonFormatter())
    audit.log.handlers = [BackgroundHandler(handler) if background else handler]
    audit.log.propagate = False
