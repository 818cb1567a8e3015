"""Binding a run that is asked for over AG-UI (ag-ui.com): the same rules as AgentFlow's own form, other names.

Pure. Only the protocol's own members, in its own spelling, go on; see `tenancy` for the rules they share.
"""

from collections.abc import Callable
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, FailFast, Field

from proxy.errors import BodyInvalid
from proxy.handles import Handles, open_handles, open_part_handles
from proxy.tenancy import (
    RunRules,
    check_roles,
    check_run_id,
    check_state,
    decode_object,
    encode_object,
    thread_or_new,
    validate_body,
)

_ROLES: Final = frozenset({"user", "assistant", "tool", "reasoning", "activity"})
_INSTRUCTING: Final = frozenset({"system", "developer"})


class RunInput(BaseModel):
    """AG-UI's RunAgentInput. The sidecar would take `thread_id` for `threadId` too; here each has one name."""

    model_config = ConfigDict(extra="forbid")

    threadId: Any = None  # noqa: N815  the protocol's own name, as are those that follow
    runId: Any = None  # noqa: N815
    protocolVersion: Annotated[str, Field(strict=True, max_length=32)] | None = None  # noqa: N815
    parentRunId: Any = None  # noqa: N815
    state: dict[str, Any] | None = None
    messages: Annotated[list[dict[str, Any]], FailFast()] = Field(default_factory=list)
    tools: Annotated[list[dict[str, Any]], FailFast()] | None = None
    context: Annotated[list[dict[str, Any]], FailFast()] | None = None
    forwardedProps: Any = None  # noqa: N815
    resume: Annotated[list[dict[str, Any]], FailFast()] | None = None


def bind_ag_ui(raw: bytes, *, tag: str, rules: RunRules, new_name: Callable[[], str]) -> tuple[bytes, str]:
    """Bind a RunAgentInput to the principal with `tag`; give the body to send and its thread id.

    The errors are those of `tenancy.bind_run`.
    """
    value = decode_object(raw)
    handles = Handles(tag, rules.file_secret)
    said = {name: value[name] for name in ("messages", "state", "resume") if name in value}
    open_handles(said, handles)
    open_part_handles(value.get("messages"), handles)
    body = validate_body(RunInput, value)
    check_roles(body.messages, _ROLES | (_INSTRUCTING if rules.allow_system else frozenset()))
    check_state(body.state, "state")
    check_run_id(body.runId, "runId")
    check_run_id(body.parentRunId, "parentRunId")
    if body.tools and not rules.allow_client_tools:
        raise BodyInvalid("tools of the client's own are not allowed here.")
    thread_id = thread_or_new(body.threadId, tag=tag, rules=rules, new_name=new_name)
    return encode_object(value | said | {"threadId": thread_id}), thread_id
