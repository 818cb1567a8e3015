"""The problems a caller can be told of, as RFC 9457 values; each knows whose fault it is. Here: the caller's own.

Those of this proxy and of the sidecar are in `outages`.
Nothing here writes a response, and no problem carries a credential or an upstream's own words.
"""

from enum import StrEnum
from typing import ClassVar

import pydantic_core

from proxy.ends import End
from proxy.model import Headers

QUOTA_EXCEEDED = "https://iana.org/assignments/http-problem-types#quota-exceeded"
REDUCED_CAPACITY = "https://iana.org/assignments/http-problem-types#temporary-reduced-capacity"
REALM = 'realm="agent"'
CLOSE = (b"connection", b"close")
"""Sent where the rest of the body is not worth reading."""


class Fault(StrEnum):
    """Whose fault a problem is."""

    CLIENT = "client"
    PROXY = "proxy"
    UPSTREAM = "upstream"


class Problem(Exception):  # noqa: N818  RFC 9457 calls it a problem
    """An error that ends a request (RFC 9457). `reason` is for the log only."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    title: ClassVar[str] = "The proxy failed"
    type: ClassVar[str] = "about:blank"
    fault: ClassVar[Fault] = Fault.PROXY
    end: End = End.FAILED

    def __init__(self, detail: str = "", *, reason: str = "") -> None:
        super().__init__(detail or self.title)
        self.detail = detail
        self.reason = reason

    def headers(self) -> Headers:
        """Give the fields that this problem adds to its response."""
        return []

    def members(self) -> dict[str, object]:
        """Give the extension members of the body (RFC 9457 §3.2)."""
        return {}

    def body(self, *, instance: str, request_id: str) -> bytes:
        """Encode as `application/problem+json`."""
        fields: dict[str, object] = {"type": self.type, "title": self.title, "status": self.status}
        if self.detail:
            fields["detail"] = self.detail
        fields |= {"instance": instance, "code": self.code, "request_id": request_id}
        return pydantic_core.to_json(fields | self.members())


class ClientProblem(Problem):
    """The request was at fault."""

    status = 400
    code = "invalid_request"
    title = "The request is malformed"
    fault = Fault.CLIENT
    end = End.REFUSED


class MalformedCredential(ClientProblem):
    """The credential cannot be read, or there are two (RFC 6750 §3.1 `invalid_request`)."""

    title = "The credential is malformed"

    def headers(self) -> Headers:
        return [(b"www-authenticate", f'Bearer {REALM}, error="invalid_request"'.encode())]


class CredentialMissing(ClientProblem):
    """No credential was presented (RFC 6750 §3: a challenge without an error code)."""

    status = 401
    code = "credential_missing"
    title = "A credential is required"

    def headers(self) -> Headers:
        return [
            (b"www-authenticate", f"Bearer {REALM}".encode()),
            (b"www-authenticate", f"ApiKey {REALM}".encode()),
        ]


class CredentialInvalid(ClientProblem):
    """The credential proves nothing. One body for every reason; the reason goes to the log."""

    status = 401
    code = "invalid_token"
    title = "The credential is not valid"

    def headers(self) -> Headers:
        return [
            (b"www-authenticate", f'Bearer {REALM}, error="invalid_token"'.encode()),
            (b"www-authenticate", f"ApiKey {REALM}".encode()),
        ]


class ScopeMissing(ClientProblem):
    """The principal lacks the operation's scope (RFC 6750 §3.1 `insufficient_scope`)."""

    status = 403
    code = "insufficient_scope"
    title = "The credential lacks a scope"

    def __init__(self, scope: str) -> None:
        super().__init__(f"This operation needs the scope {scope}.")
        self.scope = scope

    def headers(self) -> Headers:
        challenge = f'Bearer {REALM}, error="insufficient_scope", scope="{self.scope}"'
        return [(b"www-authenticate", challenge.encode())]


class NotFound(ClientProblem):
    """No such operation, or no such thread of this caller's; the two look alike."""

    status = 404
    code = "not_found"
    title = "Not found"


class MethodNotAllowed(ClientProblem):
    """The path exists, the method does not."""

    status = 405
    code = "method_not_allowed"
    title = "The method is not allowed here"

    def __init__(self, allowed: str) -> None:
        super().__init__(f"Allowed: {allowed}.")
        self.allowed = allowed

    def headers(self) -> Headers:
        return [(b"allow", self.allowed.encode())]


class BodyTimeout(ClientProblem):
    """The body did not arrive in time."""

    status = 408
    code = "body_timeout"
    title = "The request body came too slowly"

    def headers(self) -> Headers:
        return [CLOSE]


class BodyTooLarge(ClientProblem):
    """The body is over the limit."""

    status = 413
    code = "body_too_large"
    title = "The request body is too large"

    def __init__(self, limit: int) -> None:
        super().__init__(f"The limit is {limit} bytes.")


class BodyUnsupported(ClientProblem):
    """The body's media type or coding is not one we read."""

    status = 415
    code = "unsupported_media_type"
    title = "The request body must be plain application/json"


class BodyInvalid(ClientProblem):
    """The body is JSON, but not a request of this operation."""

    status = 422
    code = "invalid_body"
    title = "The request body is not valid"


class RateExceeded(ClientProblem):
    """A quota is spent (RateLimit draft: type `quota-exceeded`)."""

    status = 429
    code = "rate_exceeded"
    title = "The quota is spent"
    type = QUOTA_EXCEEDED

    def __init__(self, *, policies: tuple[str, ...], retry_after: int, fields: Headers) -> None:
        super().__init__(f"Try again in {retry_after} seconds.")
        self.policies = policies
        self.retry_after = retry_after
        self.fields = fields

    def headers(self) -> Headers:
        return [*self.fields, (b"retry-after", b"%d" % self.retry_after)]

    def members(self) -> dict[str, object]:
        return {"violated-policies": list(self.policies)}


class BudgetSpentMidway(ClientProblem):
    """The caller's tokens were spent while his run went on."""

    status = 402
    code = "budget_spent"
    title = "The token budget is spent"
    type = QUOTA_EXCEEDED
    end = End.BUDGET


class ClientLeft(ClientProblem):
    """The client hung up; nobody is left to be told (the status is nginx's, for the log)."""

    status = 499
    code = "client_left"
    title = "The client left"
    end = End.CLIENT_LEFT
