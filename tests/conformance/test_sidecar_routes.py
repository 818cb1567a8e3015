"""The operations table against the sidecar's own OpenAPI: nothing of it is reachable unnoticed.

When a release of the sidecar adds a route, this fails until the route is a row or has a reason not to be. WebSockets
are not in OpenAPI: theirs is asked for in integration/test_websockets.py.
"""

from collections.abc import Iterator

import httpx
import pytest

from proxy.operations import NOT_EXPOSED, NOT_EXPOSED_PREFIXES, OPERATIONS, Kind
from tests.support.agent import start_agent, stop

type Route = tuple[str, str]


@pytest.fixture(scope="module")
def sidecar_routes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[set[Route]]:
    """Give every method and path of a real sidecar."""
    agent = start_agent(tmp_path_factory.mktemp("agent"))
    try:
        paths = httpx.get(f"{agent.url}/openapi.json").json()["paths"]
        yield {(method.upper(), path) for path, methods in paths.items() for method in methods}
    finally:
        stop(agent.process)


def test_every_row_leads_to_a_route_of_the_sidecar(sidecar_routes: set[Route]) -> None:
    """No operation is forwarded to a path that does not exist."""
    forwarded = {(row.method, row.upstream) for row in OPERATIONS if row.kind is not Kind.DUPLEX}

    assert forwarded <= sidecar_routes


def test_every_route_of_the_sidecar_is_a_row_or_has_a_reason_not_to_be(sidecar_routes: set[Route]) -> None:
    """Default deny is a decision about each route, not an accident."""
    forwarded = {(row.method, row.upstream) for row in OPERATIONS if row.kind is not Kind.DUPLEX}
    unexplained = {
        (method, path)
        for method, path in sidecar_routes - forwarded - set(NOT_EXPOSED)
        if not any(path.startswith(prefix) for prefix in NOT_EXPOSED_PREFIXES)
    }

    assert unexplained == set()


def test_no_reason_is_kept_for_a_route_that_is_gone(sidecar_routes: set[Route]) -> None:
    """The list of what is not exposed stays true."""
    assert set(NOT_EXPOSED) <= sidecar_routes
