"""Binding what a client says on a WebSocket: each message is a run, held to the rules of a run's body.

Pure. A message that is refused is answered in the sidecar's own form of an error, and the conversation goes on.
"""

from collections.abc import Callable
from typing import Annotated, Any, Final, Literal

import pydantic_core
from pydantic import FailFast

from proxy.errors import BodyInvalid, Problem, RateExceeded
from proxy.outages import ReducedCapacity
from proxy.tenancy import (
    RunMembers,
    RunRules,
    check_roles,
    decode_object,
    encode_object,
    qualify,
    read_members,
    read_short,
    recursion_limit,
    thread_or_new,
)

NEW_THREAD: Final = "new"
"""What AgentFlow's clients name a thread that is to be made."""


class FrameBody(RunMembers):
    """AgentFlow's own message. `resume` is refused, which means nothing here."""

    invoke_type: Literal["fresh", "resume"] = "fresh"
    tool_result: Annotated[list[dict[str, Any]], FailFast()] | None = None


def bind_frame(raw: bytes, *, tag: str, rules: RunRules, new_name: Callable[[], str]) -> tuple[bytes, str]:
    """Bind one message, in AgentFlow's form or the short one; give what to send and its thread id.

    The errors are those of `tenancy.bind_run`.
    """
    value = decode_object(raw)
    if "text" in value:
        request, config = read_short(value)
    else:
        body, request, config = read_members(FrameBody, value, raw, tag=tag, rules=rules)
        check_roles(body.tool_result or [], rules.roles())
    named = config.get("thread_id")
    if isinstance(named, str) and named.strip() == NEW_THREAD:
        named = None
    if request.get("invoke_type") == "resume" and qualify(named, tag) is None:
        raise BodyInvalid("config.thread_id is required to resume.")
    thread_id = thread_or_new(named, tag=tag, rules=rules, new_name=new_name)
    request["config"] = config | {"thread_id": thread_id}
    request["recursion_limit"] = recursion_limit(request.get("recursion_limit"), rules)
    return encode_object(request), thread_id


def error_frame(problem: Problem, *, request_id: str) -> str:
    """Write a problem as the sidecar writes an error on a WebSocket."""
    data: dict[str, object] = {"reason": problem.detail or problem.title, "code": problem.code}
    data |= {"status": problem.status, "request_id": request_id}
    if isinstance(problem, RateExceeded | ReducedCapacity):
        data["retry_after_seconds"] = problem.retry_after
    return pydantic_core.to_json({"event": "error", "data": data}).decode()


def ends_a_run(frame: str | bytes | None) -> bool:
    """Say whether a message of the sidecar's is the last of a run: it is done, or was refused and so has no id.

    An error within a run, a tool's for instance, is not its end.
    """
    try:
        value = pydantic_core.from_json(frame or b"")
    except ValueError:
        return False
    if not isinstance(value, dict):
        return False
    data = value.get("data")
    if value.get("event") == "error":
        return value.get("thread_id") is None and value.get("run_id") is None
    return value.get("event") == "updates" and isinstance(data, dict) and data.get("status") == "done"


def is_error(frame: str) -> bool:
    """Say whether a message of the sidecar's is an error."""
    try:
        value = pydantic_core.from_json(frame)
    except ValueError:
        return False
    return isinstance(value, dict) and value.get("event") == "error"
