"""Two ways to an endpoint, the router's and the direct one: wherever both lead, they lead to the same."""

from typing import Any
from urllib.parse import unquote

import pytest
from starlette.routing import Route, Router

from proxy.app import Proxy
from proxy.errors import NotFound
from proxy.operations import OPERATIONS
from proxy.routes import CanonicalPaths
from tests.support.asgi import Client

PATHS = sorted({row.path for row in OPERATIONS})
ODD = ["/", "", "/agent", "/agent/invoke/", "//agent/invoke", "/agent/./invoke", "/agent/invoke%2F", "/agent%2Finvoke"]
ODD += ["/agent/%69nvoke", "/agent/invoke%0A", "/AGENT/invoke", "/agent/v1/threads/%41", "/agent/v1/threads/a%2Fstate"]


class Reached:
    """An ASGI endpoint that notes that it was reached."""

    def __init__(self, path: str, seen: list[str]) -> None:
        self._path = path
        self._seen = seen

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self._seen.append(f"{scope['method']} {self._path}")


async def reached_by(path: str, method: str, *, direct: bool) -> list[str]:
    """Ask for `path` as it is written on the wire; give what was reached."""
    seen: list[str] = []
    rows = [Route(each, Reached(each, seen)) for each in PATHS]
    app = CanonicalPaths(Router(routes=rows, redirect_slashes=False), rows if direct else [])
    client = Client()
    scope = {"type": "http", "method": method, "path": unquote(path), "raw_path": path.encode(), "headers": []}
    try:
        await app(scope, client.receive, client.send)
    except NotFound:
        seen.append("nowhere")
    return seen or [f"answered {client.sent[0]['status']}"]


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "HEAD", "PUT"])
@pytest.mark.parametrize("path", [*PATHS, *(path.format(thread_id="t", message_id="m") for path in PATHS), *ODD])
async def test_the_direct_way_leads_where_the_router_does(path: str, method: str) -> None:
    """Whatever is written on the request line, canonical or not."""
    assert await reached_by(path, method, direct=True) == await reached_by(path, method, direct=False)


def test_a_path_of_the_table_is_reached_directly() -> None:
    """So that the comparison above compares two ways, and not one with itself."""
    seen: list[str] = []
    rows = [Route(each, Reached(each, seen)) for each in PATHS]

    async def unreachable(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError(scope["path"])

    walk = CanonicalPaths(unreachable, rows)(
        {"path": "/agent/invoke", "raw_path": b"/agent/invoke", "method": "POST"}, Client().receive, Client().send
    )
    with pytest.raises(StopIteration):
        walk.__await__().__next__()

    assert seen == ["POST /agent/invoke"]


async def test_fastapis_telemetry_sees_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever sets a tracer for the process does not get our requests' paths from FastAPI."""
    app = Proxy()
    calls: list[Any] = []

    async def stack(scope: Any, receive: Any, send: Any) -> None:
        calls.append(scope)

    async def tell(**_: Any) -> None:
        raise AssertionError("telemetry was asked")

    app.middleware_stack = stack
    monkeypatch.setattr(app, "_native_telemetry", tell)
    await app({"type": "http", "path": "/"}, Client().receive, Client().send)

    assert calls[0]["app"] is app
