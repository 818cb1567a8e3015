"""The OpenAPI page: valid in shape, and the whole table is on it."""

import json
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

from proxy.agui import bind_ag_ui
from proxy.openapi import describe
from proxy.operations import OPERATIONS, Kind, Operation
from proxy.tenancy import RunRules, bind_control, bind_run

ROWS = pytest.mark.parametrize("row", OPERATIONS, ids=lambda row: f"{row.method} {row.path}")
BINDINGS: dict[Kind, Callable[[bytes, RunRules], tuple[bytes, str]]] = {
    Kind.RUN: lambda raw, rules: bind_run(raw, tag="t", rules=rules, new_name=lambda: "new"),
    Kind.AG_UI: lambda raw, rules: bind_ag_ui(raw, tag="t", rules=rules, new_name=lambda: "new"),
    Kind.CONTROL: lambda raw, rules: bind_control(raw, tag="t"),
}
MEDIA = {
    "type": "object",
    "additionalProperties": {
        "type": "object",
        "properties": {"schema": {"type": ["object", "boolean"]}, "examples": {"type": "object"}},
        "additionalProperties": False,
    },
}
SHAPE: dict[str, Any] = {
    "type": "object",
    "required": ["openapi", "info", "paths"],
    "properties": {
        "openapi": {"pattern": r"^3\.1\.\d+$"},
        "info": {"type": "object", "required": ["title", "version"]},
        "security": {"$ref": "#/$defs/security"},
        "paths": {
            "type": "object",
            "propertyNames": {"pattern": "^/"},
            "additionalProperties": {
                "type": "object",
                "minProperties": 1,
                "propertyNames": {"enum": ["get", "post", "delete"]},
                "additionalProperties": {"$ref": "#/$defs/operation"},
            },
        },
        "components": {
            "type": "object",
            "properties": {
                "schemas": {"type": "object"},
                "securitySchemes": {"type": "object", "additionalProperties": {"required": ["type"]}},
            },
            "additionalProperties": False,
        },
    },
    "additionalProperties": False,
    "$defs": {
        "security": {
            "type": "array",
            "items": {"type": "object", "additionalProperties": {"type": "array", "items": {"type": "string"}}},
        },
        "operation": {
            "type": "object",
            "required": ["responses"],
            "properties": {
                "operationId": {"type": "string", "pattern": "^[a-z0-9_]+$"},
                "summary": {"type": "string", "minLength": 1},
                "description": {"type": "string"},
                "tags": {"type": "array", "items": {"type": "string"}, "minItems": 1, "uniqueItems": True},
                "security": {"$ref": "#/$defs/security"},
                "parameters": {
                    "type": "array",
                    "uniqueItems": True,
                    "items": {
                        "type": "object",
                        "required": ["name", "in", "schema"],
                        "properties": {"in": {"enum": ["path", "query"]}},
                        "if": {"properties": {"in": {"const": "path"}}},
                        "then": {"required": ["required"], "properties": {"required": {"const": True}}},
                    },
                },
                "requestBody": {"type": "object", "required": ["content"], "properties": {"content": MEDIA}},
                "responses": {
                    "type": "object",
                    "minProperties": 1,
                    "propertyNames": {"pattern": "^[1-5][0-9]{2}$"},
                    "additionalProperties": {
                        "type": "object",
                        "required": ["description"],
                        "properties": {"description": {"type": "string", "minLength": 1}, "content": MEDIA},
                        "additionalProperties": False,
                    },
                },
            },
            "additionalProperties": False,
        },
    },
}


def described(row: Operation) -> dict[str, Any]:
    """Give what the page says of a row."""
    return describe()["paths"][row.path][row.method.lower()]


def schemas_in(value: object) -> list[dict[str, Any]]:
    """Find every schema of the document."""
    if isinstance(value, list):
        return [found for each in value for found in schemas_in(each)]
    if not isinstance(value, dict):
        return []
    own = [value["schema"]] if "schema" in value else []
    return own + [found for each in value.values() for found in schemas_in(each)]


def test_the_document_has_the_shape_of_openapi() -> None:
    """It is JSON, OpenAPI 3.1 in its form, and every schema in it is a schema of draft 2020-12."""
    document = json.loads(json.dumps(describe()))

    jsonschema.Draft202012Validator(SHAPE).validate(document)
    for schema in [*schemas_in(document["paths"]), *document["components"]["schemas"].values()]:
        jsonschema.Draft202012Validator.check_schema(schema)


def test_every_reference_leads_somewhere() -> None:
    """What a schema refers to is in the document."""
    document = describe()
    references = {schema["$ref"] for schema in schemas_in(document) if "$ref" in schema}

    assert references == {"#/components/schemas/Problem"}
    assert "Problem" in document["components"]["schemas"]


@ROWS
def test_every_row_is_there(row: Operation) -> None:
    """A row's summary, scope, parameters and answer stand on the page."""
    page = described(row)

    assert page["summary"] == row.summary
    assert f"`{row.scope}`" in page["description"]
    in_path = {each["name"] for each in page["parameters"] if each["in"] == "path"}
    assert in_path == {part[1:-1] for part in row.path.split("/") if part.startswith("{")}
    assert {each["name"] for each in page["parameters"] if each["in"] == "query"} == row.query
    media = {"stream": "text/event-stream", "ag-ui": "text/event-stream", "files.get": "*/*"}
    assert page["tags"] in (["invoke"], ["stream"], ["ping"], ["v1"], ["threads"], ["ag-ui"], ["files"], ["ws"])
    if row.kind is Kind.DUPLEX:
        assert "101" in page["responses"]
        return
    assert list(page["responses"]["200"]["content"]) == [media.get(row.name, "application/json")]
    assert ("requestBody" in page) == (row.method == "POST")


def test_nothing_else_is_there() -> None:
    """Beside the rows there are the two that need no credential, and they say so."""
    paths = describe()["paths"]
    rows = {(row.path, row.method.lower()) for row in OPERATIONS}

    others = {(path, method) for path, item in paths.items() for method in item} - rows

    assert others == {("/health/live", "get"), ("/health/ready", "get")}
    assert all(paths[path][method]["security"] == [] for path, method in others)
    assert all("security" not in described(row) for row in OPERATIONS)


def test_names_are_unique() -> None:
    """An operationId means one operation."""
    names = [described(row)["operationId"] for row in OPERATIONS]

    assert len(names) == len(set(names))


def test_either_credential_does() -> None:
    """Both schemes are described, and one of them is needed everywhere."""
    document = describe()

    assert document["security"] == [{"bearer": []}, {"apiKey": []}]
    assert document["components"]["securitySchemes"] == {
        "bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"},
        "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    }


@ROWS
def test_refusals_are_problems(row: Operation) -> None:
    """Every answer but the good one is a problem of RFC 9457."""
    refusals = {
        status: answer for status, answer in described(row)["responses"].items() if status not in ("101", "200")
    }

    assert {"400", "401", "403", "404", "429", "502", "503", "504"} <= set(refusals)
    for answer in refusals.values():
        assert answer["content"] == {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}


@ROWS
def test_the_examples_work(row: Operation) -> None:
    """What the page shows as a request is one that is accepted."""
    content = described(row).get("requestBody", {}).get("content", {})
    examples = content.get("application/json", {}).get("examples", {})
    rules = RunRules(allow_system=False, max_recursion=50, standing_thread=False)

    bound = [BINDINGS[row.kind](json.dumps(example["value"]).encode(), rules)[1] for example in examples.values()]

    assert bound == ["t~support-42"] * len(examples)
    assert len(examples) == {Kind.RUN: 2, Kind.AG_UI: 1, Kind.CONTROL: 1}.get(row.kind, 0)


def test_the_documents_are_equal_and_apart() -> None:
    """Each call gives a document of its own: who changes one changes no other."""
    document = describe()
    document["paths"].clear()

    assert describe()["paths"]
