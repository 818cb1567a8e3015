"""Who is compared: every contender, in the order of the table.

Each module holds one product's configuration.
"""

from benchmarks.contenders import caddy, envoy, fastapi, haproxy, litellm, nginx, ours, traefik
from benchmarks.contenders.model import Contender

CHECKS_NOTHING = frozenset({nginx.PLAIN.key})
CONTENDERS: tuple[Contender, ...] = (
    ours.OURS,
    ours.OURS_UNIX,
    envoy.ENVOY,
    envoy.ENVOY_CACHED,
    haproxy.HAPROXY,
    nginx.NGINX,
    nginx.PLAIN,
    traefik.TRAEFIK,
    caddy.CADDY,
    fastapi.AIOHTTP,
    fastapi.SHARED,
    fastapi.NAIVE,
    litellm.LITELLM,
)
