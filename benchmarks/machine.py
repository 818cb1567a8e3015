"""Says on what the figures were taken: processor, cores, kernel, versions.

Never a host's name, an address or a path.
"""

import os
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Machine:
    """What a reader needs to place the figures."""

    processor: str
    cores: int
    kernel: str
    python: str
    uvloop: str
    instructions: bool

    def as_dict(self) -> dict[str, object]:
        """Give plain values for JSON."""
        return asdict(self)

    def sentence(self) -> str:
        """Say it in one line."""
        counted = "perf counts instructions" if self.instructions else "no instruction counter"
        return (
            f"{self.processor}, {self.cores} cores, Linux {self.kernel}, Python {self.python}, "
            f"uvloop {self.uvloop}, {counted}"
        )


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def describe_machine(*, instructions: bool) -> Machine:
    """Describe this machine."""
    return Machine(
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)),
        kernel=".".join(platform.release().split("-")[0].split(".")[:2]),
        python=platform.python_version(),
        uvloop=metadata.version("uvloop"),
        instructions=instructions,
    )
