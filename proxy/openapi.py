"""The OpenAPI page, made from the operations table, with both security schemes and examples that work.

Pure; describes what the routes do and never adds one.
"""

from typing import Any, Final

from proxy.operations import OPERATIONS, PAGING, Kind, Operation

_TEXT: Final = {"type": "string"}
_EXAMPLES: Final = {
    "short": {"summary": "The short form", "value": {"text": "hi", "thread_id": "support-42"}},
    "full": {
        "summary": "AgentFlow's own request",
        "value": {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
            "config": {"thread_id": "support-42"},
            "recursion_limit": 25,
            "response_granularity": "low",
        },
    },
}
_AG_UI_EXAMPLES: Final = {
    "ag-ui": {
        "summary": "AG-UI's RunAgentInput",
        "value": {
            "threadId": "support-42",
            "runId": "run-1",
            "state": {},
            "messages": [{"id": "m-1", "role": "user", "content": "hi"}],
            "tools": [],
            "context": [],
            "forwardedProps": {},
        },
    },
}
_CONTROL_EXAMPLES: Final = {"stop": {"summary": "Stop a run", "value": {"thread_id": "support-42"}}}
_EXAMPLES_OF: Final = {Kind.RUN: _EXAMPLES, Kind.AG_UI: _AG_UI_EXAMPLES, Kind.CONTROL: _CONTROL_EXAMPLES}
_FORM: Final = {
    "type": "object",
    "required": ["file"],
    "properties": {"file": {"type": "string", "contentMediaType": "application/octet-stream"}},
}
_MEDIA: Final = {"stream": "text/event-stream", "ag-ui": "text/event-stream", "files.get": "*/*"}
_NAMED: Final = {0x2F: "_", 0x2D: "_", 0x7B: None, 0x7D: None}
_PROBLEM: Final = {
    "type": "object",
    "required": ["type", "title", "status", "code", "request_id"],
    "properties": {
        "type": _TEXT,
        "title": _TEXT,
        "status": {"type": "integer"},
        "detail": _TEXT,
        "instance": _TEXT,
        "code": _TEXT,
        "request_id": _TEXT,
        "violated-policies": {"type": "array", "items": _TEXT},
    },
}
_REFUSALS: Final = {
    400: "The request or its credential is malformed",
    401: "No credential, or none that is valid",
    403: "The credential lacks the scope",
    404: "No such thread of the caller's",
    413: "The body is too large",
    422: "The body is not valid",
    429: "The quota is spent",
    502: "The agent cannot be reached",
    503: "Shutting down, or overloaded",
    504: "The agent did not answer in time",
}


def describe() -> dict[str, Any]:
    """Give the OpenAPI 3.1 document."""
    paths: dict[str, dict[str, Any]] = {}
    for row in OPERATIONS:
        paths.setdefault(row.path, {})[row.method.lower()] = _operation(row)
    for name, meaning in (("live", "This process runs"), ("ready", "This process takes new work")):
        answers = {"200": {"description": meaning}}
        paths[f"/health/{name}"] = {
            "get": {"summary": meaning, "tags": ["health"], "security": [], "responses": answers}
        }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "agentflow-proxy",
            "version": "1",
            "description": "The secure front door of an AgentFlow agent server.",
        },
        "paths": paths,
        "security": [{"bearer": []}, {"apiKey": []}],
        "components": {
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"},
                "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            },
            "schemas": {"Problem": _PROBLEM},
        },
    }


def _operation(row: Operation) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": row.method.lower() + row.path.translate(_NAMED),
        "summary": row.summary,
        "description": f"Needs the scope `{row.scope}`.",
        "tags": [_tag(row)],
        "parameters": [*_path_parameters(row), *_query_parameters(row)],
        "responses": {
            **({"101": {"description": "The WebSocket is open"}} if row.kind is Kind.DUPLEX else {"200": _answer(row)}),
            **{str(status): _refusal(text) for status, text in _REFUSALS.items()},
        },
    }
    examples = _EXAMPLES_OF.get(row.kind)
    if examples is not None:
        content = {"application/json": {"schema": {"type": "object"}, "examples": examples}}
        described["requestBody"] = {"required": True, "content": content}
    if row.kind is Kind.UPLOAD:
        described["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}
    return described


def _tag(row: Operation) -> str:
    if row.kind in (Kind.AG_UI, Kind.DUPLEX):
        return row.name
    if row.path.startswith("/agent/v1/files"):
        return "files"
    return row.path.split("/")[2] if row.kind in (Kind.RUN, Kind.PLAIN) else "threads"


def _path_parameters(row: Operation) -> list[dict[str, Any]]:
    names = [part[1:-1] for part in row.path.split("/") if part.startswith("{")]
    return [{"name": name, "in": "path", "required": True, "schema": _TEXT} for name in names]


def _query_parameters(row: Operation) -> list[dict[str, Any]]:
    counts = PAGING - {"search"}
    return [
        {"name": name, "in": "query", "schema": {"type": "integer"} if name in counts else _TEXT}
        for name in sorted(row.query)
    ]


def _answer(row: Operation) -> dict[str, Any]:
    media = _MEDIA.get(row.name, "application/json")
    return {"description": "The agent's answer, byte for byte", "content": {media: {"schema": {}}}}


def _refusal(text: str) -> dict[str, Any]:
    reference = {"$ref": "#/components/schemas/Problem"}
    return {"description": text, "content": {"application/problem+json": {"schema": reference}}}
