"""Binds thread ids, and the request bodies that carry them, to the principal who sent them.

Pure. Never lets an id of another principal's pass, and never translates one back (docs/adr/0006).
"""

import base64
import hmac
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Annotated, Any, Final, Literal, cast

import pydantic_core
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError

from proxy.errors import BodyInvalid, ClientProblem, NotFound
from proxy.handles import Handles, may_name_files, open_handles

SEPARATOR: Final = "~"
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:@+=-]{0,127}", re.ASCII)
_PLAIN_ID: Final = re.compile(r"[A-Za-z0-9_:-][A-Za-z0-9_.:-]{0,127}", re.ASCII)
NAME_RULE: Final = "1 to 128 of A-Z a-z 0-9 _ . : @ + = -, the first a letter, digit or _"
_TELLABLE: Final = 20
_REMEMBERED_TAGS: Final = 10_000
STANDING_NAME: Final = "standing"
_ROLES: Final = frozenset({"user", "assistant", "tool"})
_ROLES_AND_SYSTEM: Final = frozenset({"user", "assistant", "tool", "system"})

REFUSED_CONFIG: Final = frozenset(
    {"user", "user_id", "authz", "remote_tools", "thread_meta", "resume_data", "realtime"}
)
"""Keys of `config` that steer identity or the graph's inside; so does every key that begins with `_`."""
OVERWRITTEN_CONFIG: Final = frozenset({"recursion_limit", "is_stream", "timestamp"})
"""Keys of `config` that the sidecar sets itself; dropped, so that nobody thinks they count."""
REFUSED_STATE: Final = frozenset({"context", "context_summary", "execution_meta", "current_node"})
"""Keys of `initial_state` that forge history or choose where the graph starts."""


@dataclass(frozen=True, slots=True)
class RunRules:
    """What a run's body may ask for. Without a `file_secret` no run can name a file."""

    allow_system: bool
    max_recursion: int
    standing_thread: bool
    allow_client_tools: bool = False
    file_secret: bytes | None = None

    def roles(self) -> frozenset[str]:
        """Give the roles that a caller's messages may have, in AgentFlow's form."""
        return _ROLES_AND_SYSTEM if self.allow_system else _ROLES


class RunMembers(BaseModel):
    """What AgentFlow's requests have in common. Unknown members are refused: a newer one may give them a meaning."""

    model_config = ConfigDict(extra="forbid")

    # FailFast: a list of a million wrong things is told by its first, not gathered.
    messages: Annotated[list[dict[str, Any]], FailFast()] = Field(default_factory=list)
    config: dict[str, Any] | None = None
    initial_state: dict[str, Any] | None = None
    recursion_limit: Annotated[int, Field(strict=True, ge=1, le=100)] | None = None
    response_granularity: Literal["low", "partial", "full"] | None = None


class RunBody(RunMembers):
    """AgentFlow's own request."""

    resume: Any = None


class ShortBody(BaseModel):
    """The short form: one user message."""

    model_config = ConfigDict(extra="forbid")

    text: Annotated[str, Field(min_length=1, strict=True)]
    thread_id: Any = None


class ControlBody(BaseModel):
    """A body that names the thread it acts on."""

    model_config = ConfigDict(extra="forbid")

    thread_id: Any
    config: dict[str, Any] | None = None


@lru_cache(_REMEMBERED_TAGS)
def tag_of(namespace: str, secret: bytes) -> str:
    """Derive a namespace's tag: 80 bits of HMAC-SHA256 (RFC 2104) in base32, stable for one secret."""
    digest = hmac.digest(secret, namespace.encode(), "sha256")
    return base64.b32encode(digest[:10]).decode("ascii").lower()


def qualify(value: object, tag: str) -> str | None:
    """Give the qualified form of a thread id: `<tag>~<name>`; None for an absent or blank one.

    A bare name gets `tag`, an id with `tag` is itself. Raises NotFound for another's tag and BodyInvalid
    for what is no id. Canonical text is the sidecar's: `str(value).strip()`.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BodyInvalid("thread_id must be text.")
    text = str(value).strip() if isinstance(value, str) else _digits(value)
    if not text:
        return None
    owner, separator, name = text.rpartition(SEPARATOR)
    if separator and not hmac.compare_digest(owner.encode("utf-8", "replace"), tag.encode()):
        raise NotFound("No such thread.")
    if _NAME.fullmatch(name) is None:
        raise BodyInvalid(f"thread_id must be {NAME_RULE}.")
    return f"{tag}{SEPARATOR}{name}"


def _digits(value: int) -> str:
    if not 0 <= value < 10**18:
        raise BodyInvalid("thread_id as a number must be 0 to 10^18.")
    return str(value)


def bind_parameters(parameters: Mapping[str, str], tag: str) -> dict[str, str]:
    """Bind the parameters of a path: thread ids are qualified, other ids only checked.

    Raises NotFound for another's thread and for what can be no id.
    """
    bound: dict[str, str] = {}
    for name, value in parameters.items():
        if name == "thread_id":
            try:
                bound[name] = qualify(value, tag) or ""
            except BodyInvalid as error:
                raise NotFound("No such thread.") from error
        elif _PLAIN_ID.fullmatch(value):
            bound[name] = value
    if not all(bound.get(name) for name in parameters):
        raise NotFound
    return bound


def decode_object(raw: bytes) -> dict[str, Any]:
    """Read a JSON object (RFC 8259, UTF-8, finite numbers). Raises ClientProblem when it is none."""
    try:
        value = pydantic_core.from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise ClientProblem("The body is not JSON.", reason=str(error)[:200]) from error
    if not isinstance(value, dict):
        raise ClientProblem("The body must be a JSON object.")
    return value


def bind_run(raw: bytes, *, tag: str, rules: RunRules, new_name: Callable[[], str]) -> tuple[bytes, str]:
    """Bind a run's body, in either form, to the principal with `tag`; give the body to send and its thread id.

    Raises ClientProblem (no JSON), BodyInvalid (not a run, or asks for what is refused) or NotFound
    (another's thread).
    """
    value = decode_object(raw)
    if "text" in value:
        request, config = read_short(value)
    else:
        _, request, config = read_members(RunBody, value, raw, tag=tag, rules=rules)
    thread_id = thread_or_new(config.get("thread_id"), tag=tag, rules=rules, new_name=new_name)
    request["config"] = config | {"thread_id": thread_id}
    request["recursion_limit"] = recursion_limit(request.get("recursion_limit"), rules)
    return encode_object(request), thread_id


def read_members[Body: RunMembers](
    model: type[Body], value: dict[str, Any], raw: bytes, *, tag: str, rules: RunRules
) -> tuple[Body, dict[str, Any], dict[str, Any]]:
    """Check a request that was read from `raw`, and open its files; give it, what to send of it, and its config."""
    if may_name_files(raw):
        open_files(value, Handles(tag, rules.file_secret))
    body = validate_body(model, value)
    request = {key: value[key] for key in value if key != "config"}
    check_roles(body.messages, rules.roles())
    check_state(body.initial_state, "initial_state")
    return body, request, client_config(body.config)


def read_short(value: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the short form: the request that it stands for, and its `config`. Raises BodyInvalid."""
    short = validate_body(ShortBody, value)
    block = {"type": "text", "text": short.text}
    return {"messages": [{"role": "user", "content": [block]}]}, {"thread_id": short.thread_id}


def open_files(value: dict[str, Any], handles: Handles) -> None:
    """Open every handle of a file in a body, but those in `config`, which is the graph's own business."""
    rest = {name: part for name, part in value.items() if name != "config"}
    open_handles(rest, handles)
    value.update(rest)


def thread_or_new(value: object, *, tag: str, rules: RunRules, new_name: Callable[[], str]) -> str:
    """Give the qualified form of the thread that is named, or of the one that is meant where none is."""
    name = STANDING_NAME if rules.standing_thread else None
    return qualify(value, tag) or f"{tag}{SEPARATOR}{name or new_name()}"


def recursion_limit(asked: int | None, rules: RunRules) -> int:
    """Give the number of steps that a run may take. Raises BodyInvalid above the deployment's most."""
    asked = asked or min(25, rules.max_recursion)
    if asked > rules.max_recursion:
        raise BodyInvalid(f"recursion_limit must be at most {rules.max_recursion}.")
    return asked


def bind_control(raw: bytes, *, tag: str) -> tuple[bytes, str]:
    """Bind a body that names a thread at its top; the same results and errors as `bind_run`."""
    body = validate_body(ControlBody, decode_object(raw))
    thread_id = qualify(body.thread_id, tag)
    if thread_id is None:
        raise BodyInvalid("thread_id is required.")
    config = client_config(body.config)
    named = qualify(config.pop("thread_id", None), tag)
    if named not in (None, thread_id):
        raise BodyInvalid("thread_id and config.thread_id must be the same.")
    return encode_object({"thread_id": thread_id, "config": config}), thread_id


def client_config(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Give what of a `config` may go on. Raises BodyInvalid for what steers identity or the graph's inside."""
    kept = {key: value for key, value in (config or {}).items() if key not in OVERWRITTEN_CONFIG}
    if refused := [key for key in kept if key in REFUSED_CONFIG or key.startswith("_")]:
        raise BodyInvalid(f"config may not set {', '.join(sorted(refused)[:5])[:200]}.")
    check_run_id(kept.get("run_id"), "config.run_id")
    return kept


def check_run_id(value: object, where: str) -> None:
    """Raise BodyInvalid for a run id, the member `where`, that is there and cannot be written into a log as it is."""
    if value is not None and not (isinstance(value, str) and _PLAIN_ID.fullmatch(value)):
        raise BodyInvalid(f"{where} must be 1 to 128 of A-Z a-z 0-9 _ . : -.")


def check_roles(messages: list[dict[str, Any]], roles: frozenset[str]) -> None:
    """Raise BodyInvalid for a message with another role."""
    for position, message in enumerate(messages):
        role = message.get("role")
        if not isinstance(role, str) or role not in roles:
            raise BodyInvalid(f"messages[{position}].role must be one of {', '.join(sorted(roles))}.")


def check_state(state: Mapping[str, Any] | None, where: str) -> None:
    """Raise BodyInvalid for a state, the member `where`, that forges history or chooses where the graph starts."""
    if refused := [key for key in state or () if key in REFUSED_STATE or key.startswith("_")]:
        raise BodyInvalid(f"{where} may not set {', '.join(sorted(refused)[:5])[:200]}.")


def validate_body[Body: BaseModel](model: type[Body], value: dict[str, Any]) -> Body:
    """Read a decoded object as `model`. Raises BodyInvalid, which tells the first few faults."""
    if not value.keys() <= _members_of(model):
        unknown = value.keys() - _members_of(model)
        named = ", ".join(sorted(unknown)[:5])[:200] if len(unknown) <= _TELLABLE else f"{len(unknown)} of them"
        raise BodyInvalid(f"unknown members: {named}.")
    try:
        return cast("Body", model.__pydantic_validator__.validate_python(value))
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False, include_context=False)[:5]
        told = (f"{'.'.join(str(part)[:64] for part in fault['loc'])}: {fault['msg']}" for fault in faults)
        raise BodyInvalid("; ".join(told)) from error


@cache
def _members_of(model: type[BaseModel]) -> frozenset[str]:
    """Give the names of a model's members; pydantic's own look-up takes 20 k instructions."""
    return frozenset(model.model_fields)


def encode_object(value: dict[str, Any]) -> bytes:
    """Write a bound object. Raises BodyInvalid for a number that JSON cannot carry on."""
    encoded = pydantic_core.to_json(value)
    # A number too large for a double was read as infinite, which JSON cannot carry on.
    if b"I" in encoded and b"Infinity" in encoded and not is_finite(value):  # one letter is found at once
        raise BodyInvalid("The body holds a number that is too large.")
    return encoded


def is_finite(value: object) -> bool:
    """Say whether every number in a decoded JSON value is one that JSON can carry."""
    if isinstance(value, dict):
        return all(map(is_finite, value.values()))
    if isinstance(value, list):
        return all(map(is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)
