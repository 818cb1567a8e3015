"""The metrics there are: name, kind, labels and meaning of each, as one table.

Pure values; all but those of the process begin with `agent_proxy_`. No label ever holds who calls, and each has few values: the names of the table of operations and such.
"""

from dataclasses import dataclass
from typing import Final, Literal

PREFIX: Final = "agent_proxy_"

type Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True)
class Family:
    """One metric. `merge` is how the values of several workers become one; counters and histograms are summed."""

    name: str
    kind: Kind
    text: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()
    merge: Literal["sum", "min", "max"] = "sum"


SHORT: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
LONG: Final = (
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    120.0,
    300.0,
    600.0,
    1800.0,
    3600.0,
)

FAMILIES: Final[dict[str, Family]] = {
    family.name: family
    for family in (
        Family("requests", "counter", "Requests that ended.", ("operation", "method", "status", "credential")),
        Family("request_duration_seconds", "histogram", "From a request's head to the end of its answer.", ("operation",), LONG),
        Family("time_to_first_byte_seconds", "histogram", "From a request's head to the first byte of its answer's body.", ("operation",), LONG),
        Family("run_duration_seconds", "histogram", "Time of runs that the agent answered with 200.", ("operation",), LONG),
        Family("runs", "counter", "Runs that reached the agent, by how they ended.", ("operation", "end")),
        Family("stream_end", "counter", "Streams that began, by how they ended.", ("reason",)),
        Family("problems", "counter", "Requests that ended with a problem, by its code and whose fault it is.", ("code", "fault")),
        Family("limit_decisions", "counter", "What the limits decided.", ("policy", "outcome")),
        Family("model_tokens", "counter", "Model tokens, as the agent reported or the proxy estimated them.", ("operation", "direction", "estimated")),
        Family("turns", "counter", "Whole messages of the assistant.", ("operation",)),
        Family("received_bytes", "counter", "Bytes of request bodies that were read.", ("operation",)),
        Family("sent_bytes", "counter", "Bytes of answers' bodies that were sent.", ("operation",)),
        Family("requests_in_flight", "gauge", "Requests that are being answered."),
        Family("runs_in_flight", "gauge", "Runs whose callers wait for the answer.", ("operation",)),
        Family("runs_abandoned", "gauge", "Runs that go on upstream though their clients have left."),
        Family("streams_active", "gauge", "Streams that have begun and not ended."),
        Family("upstream_connections", "gauge", "Connections to the sidecar.", ("state",)),
        Family("key_store_up", "gauge", "Whether the key store answers; 1 also where there is none.", (), (), "min"),
        Family("limiter_degraded", "gauge", "Whether limits are counted by this process alone, for want of Redis.", (), (), "max"),
        Family("ready", "gauge", "Whether new work is wanted.", (), (), "min"),
        Family("event_loop_lag_seconds", "histogram", "How late the event loop was, sampled four times a second.", (), SHORT),
        Family("log_lines_dropped", "counter", "Lines of the log that could not be written."),
        Family("workers", "gauge", "Worker processes that report."),
        Family("process_cpu_seconds", "counter", "CPU time, user and system."),
        Family("process_start_time_seconds", "gauge", "When the process began, in Unix seconds.", (), (), "min"),
        Family("process_virtual_memory_bytes", "gauge", "Virtual memory."),
        Family("process_resident_memory_bytes", "gauge", "Resident memory."),
        Family("process_open_fds", "gauge", "Open file descriptors."),
        Family("process_max_fds", "gauge", "The most file descriptors that may be open."),
        Family("build_info", "gauge", "Always 1; the version is in the label.", ("version",), (), "max"),
    )
}  # fmt: skip
