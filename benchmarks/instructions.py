"""Counts instructions of running processes with `perf stat`, where kernel and processor let us.

Counts nothing and says so where they do not; µs then have to do.
"""

import shutil
import signal
import subprocess
import time
from collections.abc import Sequence

EVENT = "instructions"


def _read(text: str) -> float | None:
    for line in text.splitlines():
        fields = line.split(",")
        if len(fields) > 2 and fields[2].startswith(EVENT) and fields[0].replace(".", "").isdigit():
            return float(fields[0])
    return None


def can_count() -> bool:
    """Say whether `perf stat` counts instructions here."""
    if shutil.which("perf") is None:
        return False
    command = ["perf", "stat", "-x", ",", "-e", EVENT, "--", "true"]  # found on the path by design
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return _read(result.stderr) is not None


class Counter:
    """Counts what `pids` and the threads they make execute from `start` to `stop`."""

    def __init__(self, pids: Sequence[int]) -> None:
        self.pids = pids
        self._perf: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Attach; the short wait is for perf to have opened its counters."""
        command = ["perf", "stat", "-x", ",", "-e", EVENT, "-p", ",".join(map(str, self.pids))]
        self._perf = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        time.sleep(0.3)

    def stop(self) -> float | None:
        """Detach and give the number, None when perf gave none."""
        if self._perf is None:
            return None
        self._perf.send_signal(signal.SIGINT)
        try:
            _, text = self._perf.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            self._perf.kill()
            _, text = self._perf.communicate()
        return _read(text)
