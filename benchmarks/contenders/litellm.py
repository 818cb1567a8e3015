"""LiteLLM's proxy with two pass-through endpoints and custom authentication.

Without a database and without callbacks; its start takes a while.
"""

import json

from benchmarks.contenders.model import ROOT, Contender, Launch, Place, find_command, find_version, plain_environment

FROM_CONFIG = "litellm_auth.verify"
SHIM = "from benchmarks.contenders.litellm_auth import verify\n"  # LiteLLM looks for it beside its configuration


def _prepare(place: Place) -> Launch:
    version = find_version("litellm", "fastapi", "uvicorn")
    command = find_command("litellm", "litellm")
    place.write("litellm_auth.py", SHIM)
    target = f"http://127.0.0.1:{place.upstream}/v1/graph"
    endpoints = [
        {"path": f"/agent/{name}", "target": f"{target}/{name}", "auth": True, "headers": {"accept": "*/*"}}
        for name in ("invoke", "stream")
    ]
    config = {
        "model_list": [],
        "general_settings": {"custom_auth": FROM_CONFIG, "pass_through_endpoints": endpoints},
        "litellm_settings": {"telemetry": False, "request_timeout": 3600},
    }
    path = place.write("litellm.yaml", json.dumps(config))
    environment = plain_environment(
        PYTHONPATH=f"{ROOT}:{place.directory}",
        HOME=str(place.directory),
        LITELLM_LOCAL_MODEL_COST_MAP="True",
        LITELLM_MODE="PRODUCTION",
        LITELLM_LOG="ERROR",
        LITELLM_MASTER_KEY="sk-benchmark-0123456789abcdef0123456789abcdef0123456789abcdef",
        BENCH_LIMIT=str(place.per_minute),
    )
    flags = ("--config", str(path), "--host", "127.0.0.1", "--port", str(place.port), "--num_workers", "1")
    return Launch(
        version,
        ((command, *flags, "--telemetry", "False"),),
        environment,
        invoke="/agent/invoke",
        stream="/agent/stream",
        ready_seconds=90.0,
    )


LITELLM = Contender("litellm", "LiteLLM proxy, pass-through", "custom_auth with PyJWT, rpm limit per caller", _prepare)
