"""`serve --workers N`: several processes behind one port, for a machine of its own without an orchestrator.

The supervisor starts them, starts another where one died, and passes signals on; it serves nobody itself. In a
container one process is the rule, and replicas are the orchestrator's.
"""

import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

log: Final = logging.getLogger("agentflow_proxy.workers")
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
_ENDED_WELL: Final = (0, -signal.SIGTERM, -signal.SIGINT)
"""Of its own accord, or by a signal that came before it served anybody."""
PAUSE_SECONDS: Final = 1.0
"""Between two starts of one worker: one that dies at once must not take the machine with it."""


@dataclass(slots=True, eq=False)
class _Worker:
    started_at: float = 0.0
    pid: int | None = None


class Supervisor:
    """Keeps `count` workers alive on `listener`.

    `serve` runs in each of them: it gets its place (from 0), the listener and what to call once it
    listens, and gives the exit status.
    `died` is told the process id of each worker that has ended, in the supervisor.
    """

    def __init__(
        self,
        count: int,
        listener: socket.socket,
        serve: Callable[[int, socket.socket, Callable[[], None]], int],
        *,
        died: Callable[[int], None] = lambda _pid: None,
    ) -> None:
        self._workers = [_Worker() for _ in range(count)]
        self._listener = listener
        self._serve = serve
        self._died = died
        self._stopping = False
        self._status = 0
        self._ever_started = False
        self._started_read, self._started_write = os.pipe()
        os.set_blocking(self._started_read, False)
        self._alive_read, self._alive_write = os.pipe()

    def run(self) -> int:
        """Supervise until a signal; give 0, or 1 where no worker could ever start, or one did not end well."""
        # A collection writes into all that it looks at, and workers no longer share what was written to: of what is
        # here before the first of them begins, none is looked at again. It is half of what each would take.
        gc.collect()
        gc.freeze()
        previous = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            while True:
                for worker in self._workers:
                    self._revive(worker, previous)
                if self._stopping and not any(worker.pid for worker in self._workers):
                    return self._status
                self._meet(signal.sigtimedwait(_SIGNALS, PAUSE_SECONDS))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous)

    def _meet(self, received: signal.struct_siginfo | None) -> None:
        self._reap()
        number = received.si_signo if received is not None else signal.SIGCHLD
        if number == signal.SIGCHLD:
            return
        if number != signal.SIGHUP:
            self._stop()
        self._tell(signal.Signals(number))

    def _stop(self) -> None:
        """Let no worker be started any more; the port closes once the last worker has closed it."""
        if not self._stopping:
            self._stopping = True
            self._listener.close()
            log.info("workers.draining")

    def _tell(self, number: signal.Signals) -> None:
        for worker in self._workers:
            if worker.pid is not None:
                os.kill(worker.pid, number)

    def _reap(self) -> None:
        for worker in self._workers:
            if worker.pid is None:
                continue
            pid, wait_status = os.waitpid(worker.pid, os.WNOHANG)
            if not pid:
                continue
            worker.pid = None
            self._died(pid)
            status = os.waitstatus_to_exitcode(wait_status)
            if self._stopping:
                self._status = self._status or int(status not in _ENDED_WELL)
                continue
            log.error("worker.died", extra={"fields": {"worker": pid, "status": status}})
            if not self._has_started():  # nor would another: what is wrong is not one worker's
                self._status = 1
                self._stop()
                self._tell(signal.SIGTERM)

    def _has_started(self) -> bool:
        """Say whether any worker has ever listened."""
        with suppress(BlockingIOError):
            self._ever_started = bool(os.read(self._started_read, 4096)) or self._ever_started
        return self._ever_started

    def _revive(self, worker: _Worker, mask: set[signal.Signals | int]) -> None:
        now = time.monotonic()
        if worker.pid is not None or self._stopping or now - worker.started_at < PAUSE_SECONDS:
            return
        worker.started_at = now
        worker.pid = os.fork()
        if worker.pid == 0:
            os._exit(self._become_worker(self._workers.index(worker), mask))

    def _become_worker(self, place: int, mask: set[signal.Signals | int]) -> int:
        """Serve as one of the workers; give the exit status. Never returns into the supervisor's loop."""
        os.close(self._alive_write)
        # Before the first signal handler is there, the default ends the process, which then serves nobody.
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        threading.Thread(target=self._outlive_nobody, daemon=True).start()
        try:
            status = self._serve(place, self._listener, self._tell_started)
        except BaseException as error:  # noqa: BLE001  the process's edge: whatever it was, it must not fork on
            log.error("worker.failed", extra={"fields": {"error": type(error).__name__}})  # noqa: TRY400  with its type
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        return status

    def _tell_started(self) -> None:
        os.write(self._started_write, b"+")

    def _outlive_nobody(self) -> None:
        """Drain when the supervisor is gone, however it went: it holds the other end."""
        os.read(self._alive_read, 1)
        os.kill(os.getpid(), signal.SIGTERM)
