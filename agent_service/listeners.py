"""Listening sockets: at a port, or on a Unix socket that only this user and group can connect to.

Never takes a place at which somebody else listens.
"""

import fcntl
import os
import socket
import stat
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

BACKLOG = 2048
_NOBODY_ELSE = 0o117
"""The bits that a new socket lacks (umask(2)): to connect takes the right to write, which leaves owner and group."""


class UnixListener(socket.socket):
    """A listening Unix socket that knows its own file from another's of the same name."""

    file: tuple[int, int]

    def unlink(self) -> None:
        """Remove its file, before it is closed: later the system may give another file the same number."""
        with suppress(OSError):
            path = Path(self.getsockname())
            if _file_at(path) == self.file:
                path.unlink()


def bind_at(host: str, port: int) -> socket.socket:
    """Take a port; 0 is a free one. Raises OSError.

    uvicorn listens on it once the graph is ready. Until then it refuses: a balancer would otherwise find that this
    agent has the fewest runs, and give it every new one to keep waiting.
    """
    bound = socket.socket()
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except BaseException:
        bound.close()
        raise
    return bound


def listen_on(path: Path, *, patience: float = 10) -> UnixListener:
    """Listen on the Unix socket `path`, in the place of one that a server which is gone has left. Raises OSError.

    At once, unlike at a port: no balancer is before it, and what is only bound could not be told from what is deserted.
    uvicorn's own `--uds` lets everybody on the machine connect (mode 0666). Others that start there have `patience`
    seconds to take their places: whoever may read the directory could hold it for ever.
    """
    listener = UnixListener(socket.AF_UNIX)
    try:
        with _alone_in(path.parent, patience):
            _remove_deserted(path)
            mask = os.umask(_NOBODY_ELSE)  # not chmod afterwards: whoever connects in between stays connected
            try:
                listener.bind(str(path))
            finally:
                os.umask(mask)
            listener.file = _file_at(path)
            listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def address_of(listener: socket.socket) -> str:
    """Write where a listener can be reached, as the proxy's settings do."""
    if isinstance(listener, UnixListener):
        return f"http+unix://{listener.getsockname()}"
    host, port = listener.getsockname()[:2]
    return f"http://{host}:{port}"


@contextmanager
def _alone_in(directory: Path, patience: float) -> Generator[None]:
    """Keep out others that start there: what one has bound, and not yet listens on, looks deserted to another."""
    descriptor, deadline = os.open(directory, os.O_RDONLY), time.monotonic() + patience
    try:
        while not _is_locked(descriptor):
            if time.monotonic() >= deadline:
                raise TimeoutError(f"{directory} is locked by another process, see /proc/locks")
            time.sleep(0.01)
        yield
    finally:
        os.close(descriptor)


def _is_locked(descriptor: int) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _file_at(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_dev, found.st_ino


def _remove_deserted(path: Path) -> None:
    with suppress(FileNotFoundError), socket.socket(socket.AF_UNIX) as probe:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            return
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
        except BlockingIOError:  # its queue is full: somebody listens
            return
