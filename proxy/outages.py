"""The problems that no caller can mend: this proxy cannot serve now, or the sidecar did not."""

from typing import Final

from proxy.ends import End
from proxy.errors import CLOSE, REDUCED_CAPACITY, Fault, Problem
from proxy.model import Headers

_DEADLINES: Final = {
    "connect": End.CONNECT_DEADLINE,
    "first byte": End.FIRST_BYTE_DEADLINE,
    "idle": End.IDLE_DEADLINE,
}


class Unavailable(Problem):
    """Not now; soon, perhaps."""

    status = 503
    code = "unavailable"
    type = REDUCED_CAPACITY
    end = End.UNAVAILABLE

    def headers(self) -> Headers:
        return [(b"retry-after", b"1")]


class Draining(Unavailable):
    """This process is shutting down."""

    code = "draining"
    title = "This proxy is shutting down"

    def headers(self) -> Headers:
        return [*super().headers(), CLOSE]


class PoolExhausted(Unavailable):
    """Every upstream connection is in use."""

    code = "overloaded"
    title = "Too many requests are in flight"


class ReducedCapacity(Unavailable):
    """This process has more to do than it may, so that new work has to wait; what runs goes on."""

    code = "reduced_capacity"
    title = "This proxy has too much to do"

    def __init__(self, detail: str = "", *, retry_after: int = 1, reason: str = "") -> None:
        super().__init__(detail, reason=reason)
        self.retry_after = retry_after

    def headers(self) -> Headers:
        return [(b"retry-after", b"%d" % self.retry_after)]


class KeyStoreDown(Unavailable):
    """A key is not known here, and the store that may know it does not answer."""

    code = "key_store_down"
    title = "Keys cannot be looked up"


class KeysUnavailable(Unavailable):
    """An issuer's keys were never fetched, or too long ago: nothing can be said of its tokens yet."""

    code = "keys_unavailable"
    title = "The credential cannot be proven now"


class LimitsUnavailable(Unavailable):
    """Redis does not answer, and PROXY_LIMITS_WITHOUT_REDIS says to refuse then."""

    code = "limits_unavailable"
    title = "Limits cannot be counted now"


class RedisDown(Exception):  # noqa: N818  a state, not a mistake
    """Redis did not do what was asked, or not in time: `reason`; no problem yet, but for `admission` to meet.

    `answered`: it said so itself, and will again.
    """

    def __init__(self, reason: str, *, answered: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.answered = answered


class UpstreamProblem(Problem):
    """The sidecar was at fault."""

    status = 502
    code = "upstream_unreachable"
    title = "The agent cannot be reached"
    fault = Fault.UPSTREAM
    end = End.UPSTREAM_UNREACHABLE


class UpstreamCut(UpstreamProblem):
    """The answer ended before its end."""

    code = "upstream_cut"
    title = "The agent's answer was cut off"
    end = End.UPSTREAM_CUT


class UpstreamMalformed(UpstreamProblem):
    """The answer broke HTTP's framing rules (RFC 9112), or ours for it."""

    code = "upstream_malformed"
    title = "The agent's answer cannot be read"
    end = End.UPSTREAM_MALFORMED


class LineTooLong(UpstreamProblem):
    """A line was longer than an event may be."""

    code = "line_too_long"
    title = "The agent sent a line that is too long"
    end = End.LINE_TOO_LONG


class RunRefused(UpstreamProblem):
    """The sidecar answered with something else than a stream, when the client already had a stream's beginning."""

    code = "upstream_error"
    title = "The run failed"
    end = End.UPSTREAM_ERROR


class RunDeadline(UpstreamProblem):
    """The exchange took longer than it may in all, whoever was slow."""

    status = 504
    code = "total_deadline"
    title = "The answer took too long"
    end = End.TOTAL_DEADLINE


class UpstreamDistrust(UpstreamProblem):
    """The sidecar refused our internal token: its secret, issuer or audience is not ours. Never the caller's 401."""

    code = "upstream_distrust"
    title = "The agent does not trust this proxy"


class UpstreamDeadline(UpstreamProblem):
    """The answer did not come, or did not go on, in time."""

    status = 504
    code = "upstream_deadline"
    title = "The agent did not answer in time"

    def __init__(self, detail: str = "", *, reason: str = "") -> None:
        super().__init__(detail, reason=reason)
        self.end = _DEADLINES.get(reason, End.FIRST_BYTE_DEADLINE)


def require_trust(status: int) -> None:
    """Raise UpstreamDistrust for a 401: that is about our token, not the caller's."""
    if status == 401:  # noqa: PLR2004  Unauthorized
        raise UpstreamDistrust
