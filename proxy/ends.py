"""How an exchange ended: one closed set of reasons, which the access line, the metric and the docs all read.

Values only. That a body came to its end is no success by itself: a run can fail in the last line of a whole body.
"""

from enum import StrEnum


class End(StrEnum):
    """Why an exchange is over; docs/streaming.md says what of it a client sees."""

    DONE = "done"
    """Upstream's answer was whole and was passed on whole."""
    UPSTREAM_ERROR = "upstream_error"
    """The body was whole, and its lines said that the run failed."""
    STOPPED = "stopped"
    """The run ended after its caller had asked for that."""
    BUDGET = "budget_spent"
    """The caller's tokens were spent while it ran."""
    UPSTREAM_CUT = "upstream_cut"
    """Upstream's connection broke in the middle of the answer."""
    UPSTREAM_MALFORMED = "upstream_malformed"
    """Upstream broke HTTP's framing rules."""
    UPSTREAM_UNREACHABLE = "upstream_unreachable"
    """Upstream took no connection, or does not trust this proxy."""
    LINE_TOO_LONG = "line_too_long"
    """A line was longer than an event may be."""
    CONNECT_DEADLINE = "connect_deadline"
    """Upstream did not accept in time."""
    FIRST_BYTE_DEADLINE = "first_byte_deadline"
    """Upstream's answer did not begin in time."""
    IDLE_DEADLINE = "idle_deadline"
    """Upstream's answer did not go on in time."""
    TOTAL_DEADLINE = "total_deadline"
    """The whole took too long, whoever was slow."""
    CLIENT_LEFT = "client_left"
    """The client hung up, or closed its half of the connection."""
    SHUTDOWN = "shutdown"
    """This process ended, and its grace was over."""
    REFUSED = "refused"
    """The request was answered with a problem, the caller's own; the code says which."""
    UNAVAILABLE = "unavailable"
    """The request was answered with a problem: this proxy could not serve it now."""
    FAILED = "failed"
    """A fault in this proxy."""
