"""agentflow-proxy itself, started by its command with the settings of a deployment and limits that never refuse.

Refusals are measured on it too, with a wrong token and with a limit that is soon reached.
"""

import os
import subprocess
from collections.abc import Mapping

from benchmarks.contenders.model import AbsentError, Contender, Launch, Place, plain_environment
from benchmarks.tokens import AGENT_SECRET, AUDIENCE, ISSUER, SECRET


def environment(place: Place) -> dict[str, str]:
    """Give the settings of one proxy in front of the stub."""
    return plain_environment(
        PROXY_HOST="127.0.0.1",
        PROXY_PORT=str(place.port),
        PROXY_AGENT_URL=f"http://127.0.0.1:{place.upstream}",
        PROXY_AGENT_SECRET=AGENT_SECRET,
        PROXY_JWT_SECRET=SECRET,
        PROXY_JWT_ISSUER=ISSUER,
        PROXY_JWT_AUDIENCE=AUDIENCE,
        PROXY_RATE_LIMIT=f"{place.per_minute}/minute",
        PROXY_AUTH_FAILURE_LIMIT="off",
        PROXY_POOL_CONNECTIONS="16384",
        PROXY_METRICS_PORT="0",
    )


def _prepare(place: Place) -> Launch:
    return _launch(place, environment(place))


def _prepare_unix(place: Place) -> Launch:
    return _launch(place, environment(place) | {"PROXY_AGENT_URL": f"http+unix://{place.upstream_socket}"})


def _launch(place: Place, settings: Mapping[str, str]) -> Launch:
    command = place.ours
    if not command.exists():
        raise AbsentError("its command is not installed; make it with `make dev`")
    version = _describe(command.parent.parent.parent)
    return Launch(
        version=version,
        commands=((os.fspath(command), "serve"),),
        environment=settings,
        invoke="/agent/invoke",
        stream="/agent/stream",
    )


def _describe(tree: os.PathLike[str]) -> str:
    command = ["git", "-C", os.fspath(tree), "describe", "--always", "--dirty"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"agentflow-proxy {result.stdout.strip() or 'unknown'}"


OURS = Contender(
    "ours",
    "agentflow-proxy",
    "everything on: JWT, tenancy, limit with RateLimit headers, access line, usage, metrics",
    _prepare,
    ours=True,
)

OURS_UNIX = Contender(
    "ours-unix",
    "agentflow-proxy, sidecar on a Unix socket",
    "as above, but for the way to the sidecar: PROXY_AGENT_URL=http+unix://…",
    _prepare_unix,
    ours=True,
)
