"""The page /docs: the OpenAPI document for people, with a line to paste for each operation.

Pure; one document that loads nothing, from here or from elsewhere, and runs no script.
"""

import json
from html import escape
from typing import Any, Final

POLICY: Final = (
    "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Content-Security-Policy: even if something got into the page, it could neither run nor call."""
_STYLE: Final = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color-scheme:light dark}"
    "pre{overflow-x:auto;padding:.75rem;border:1px solid #8886;border-radius:.3rem}code,pre{font-size:.9rem}"
    "h3{margin:2rem 0 0}summary{cursor:pointer}"
)
_HOW: Final = (
    ' For machines: <a href="/openapi.json">openapi.json</a>, which every OpenAPI tool reads.</p>'
    "<p>In these lines <code>$URL</code> is where this page is, and <code>$KEY</code> an API key; with a token write "
    "<code>-H &quot;Authorization: Bearer $JWT&quot;</code> in the place of "
    "<code>-H &quot;X-API-Key: $KEY&quot;</code>.</p>"
)


def page(document: dict[str, Any]) -> bytes:
    """Write the page of an OpenAPI document."""
    info = document["info"]
    parts = [f"<h1>{escape(info['title'])}</h1><p>{escape(info['description'])}{_HOW}"]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts.append(_section(method.upper(), path, operation))
    head = f'<meta charset="utf-8"><title>{escape(info["title"])}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'.encode()


def _section(method: str, path: str, operation: dict[str, Any]) -> str:
    asked = "".join(
        f"<li><code>{escape(each['name'])}</code> in the {escape(each['in'])}</li>" for each in _asked(operation)
    )
    answers = "".join(
        f"<li>{escape(status)}: {escape(answer['description'])}</li>"
        for status, answer in operation["responses"].items()
    )
    lines = "".join(f"<p>{escape(name)}</p><pre>{escape(line)}</pre>" for name, line in _lines(method, path, operation))
    return (
        f"<h3><code>{method} {escape(path)}</code></h3><p>{escape(operation['summary'])}. "
        f"{escape(operation.get('description', 'Needs no credential.')).replace('`', '')}</p>{lines}<ul>{asked}</ul>"
        f"<details><summary>Answers</summary><ul>{answers}</ul></details>"
    )


def _asked(operation: dict[str, Any]) -> list[dict[str, Any]]:
    asked: list[dict[str, Any]] = operation.get("parameters", [])
    return asked


def _lines(method: str, path: str, operation: dict[str, Any]) -> list[tuple[str, str]]:
    """Give what to paste: a line for each example, or one."""
    credential = "" if operation.get("security") == [] else ' -H "X-API-Key: $KEY"'
    verb = "" if method in {"GET", "POST"} else f" -X {method}"
    call = f'curl -sN{verb} "$URL{path}"{credential}'
    media = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    examples: dict[str, dict[str, Any]] = media.get("examples", {})
    return [
        (example["summary"], f"{call} -H 'Content-Type: application/json' \\\n  -d '{json.dumps(example['value'])}'")
        for example in examples.values()
    ] or [("", call)]
