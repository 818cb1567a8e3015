"""The edge's limits and times fit those of the proxy behind it and of the container around it.

Reads the configuration with a parser that is not nginx; what nginx does with it is tested with nginx.
"""

import re
from pathlib import Path
from typing import Any

import crossplane  # type: ignore[import-untyped]
import pytest
import yaml

from proxy import forwarding, server
from proxy.authentication import PUBLIC
from proxy.settings import Settings
from tests.support.nginx import CONFIG

DEPLOY = CONFIG.parent
UNITS = {"s": 1, "m": 60, "k": 1 << 10}

YOUNGER = 'unknown directive "http2"'
"""A directive (nginx 1.25.1) that the parser has not heard of."""


def blocks(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give every directive, those in blocks too."""
    return [each for entry in entries for each in (entry, *blocks(entry.get("block", [])))]


@pytest.fixture(scope="module")
def directives() -> list[dict[str, Any]]:
    """Give every directive of the deployed configuration."""
    return blocks(crossplane.parse(str(CONFIG))["config"][0]["parsed"])


def arguments(directives: list[dict[str, Any]], name: str) -> list[list[str]]:
    """Give the arguments of each directive of this name."""
    return [each["args"] for each in directives if each["directive"] == name]


def amount(text: str) -> int:
    """Give seconds or bytes."""
    digits, unit = re.fullmatch(r"(\d+)([a-z]?)", text).groups()  # type: ignore[union-attr]
    return int(digits) * UNITS.get(unit, 1)


def compose(service: str) -> dict[str, Any]:
    """Give a service of the compose file."""
    value: dict[str, Any] = yaml.safe_load((DEPLOY / "docker-compose.yml").read_text())["services"][service]
    return value


def default(name: str) -> Any:
    """Give the default of one of the proxy's settings."""
    return Settings.model_fields[name].default


@pytest.mark.parametrize("tls", [False, True])
def test_strict_parser_finds_no_fault(tmp_path: Path, *, tls: bool) -> None:
    """Every directive is known, where it belongs and has what it needs, with the TLS example laid in too."""
    (tmp_path / "tls").mkdir()
    (tmp_path / "nginx.conf").write_text(CONFIG.read_text())
    if tls:
        (tmp_path / "tls" / "tls.conf").write_text((DEPLOY / "tls.conf.example").read_text())

    parsed = crossplane.parse(str(tmp_path / "nginx.conf"), strict=False, check_ctx=True, check_args=True)
    strict = crossplane.parse(str(tmp_path / "nginx.conf"), strict=True)

    # The strict mode takes a map's lines for directives.
    maps = {
        line["line"]
        for each in blocks(parsed["config"][0]["parsed"])
        if each["directive"] == "map"
        for line in each["block"]
    }
    assert parsed["errors"] == []
    faults = [error for error in strict["errors"] if error["line"] not in maps]
    assert [error for error in faults if not error["error"].startswith(YOUNGER)] == []
    assert len(parsed["config"]) == 1 + tls


def test_edge_outwaits_the_proxy(directives: list[dict[str, Any]]) -> None:
    """The proxy gives a silent agent up before the edge gives the proxy up, so that the reason is told."""
    longest = max(amount(value) for (value,) in arguments(directives, "proxy_read_timeout"))

    assert longest > max(default("first_byte_timeout_seconds"), default("idle_timeout_seconds"))


def test_proxy_refuses_large_bodies_first(directives: list[dict[str, Any]]) -> None:
    """The edge lets a little more through than the proxy takes, and not much more."""
    (most,), (most_of_a_file,) = arguments(directives, "client_max_body_size")

    assert default("max_body_bytes") < amount(most) <= default("max_body_bytes") * 1.1
    assert default("max_upload_bytes") < amount(most_of_a_file) <= default("max_upload_bytes") * 1.1
    assert f":-{default('max_body_bytes')}}}" in compose("proxy")["environment"]["PROXY_MAX_BODY_BYTES"]


def test_edge_lets_idle_connections_go_first(directives: list[dict[str, Any]]) -> None:
    """The edge drops an idle connection before the proxy does, so that no request meets its closing."""
    client, upstream = (amount(value) for (value,) in arguments(directives, "keepalive_timeout"))

    assert max(client, upstream) < server.KEEP_ALIVE_SECONDS


def test_containers_outwait_their_drain(directives: list[dict[str, Any]]) -> None:
    """No container is killed while it still lets answers end."""
    ((drain,),) = arguments(directives, "worker_shutdown_timeout")
    grace = int(re.findall(r":-(\d+)}", compose("proxy")["environment"]["PROXY_GRACE_SECONDS"])[0])

    assert grace == default("grace_seconds")
    assert amount(compose("nginx")["stop_grace_period"]) > amount(drain)
    assert amount(compose("proxy")["stop_grace_period"]) > grace


def test_edge_keeps_the_request_ids_that_the_proxy_keeps(directives: list[dict[str, Any]]) -> None:
    """Both hold the same ids for safe, so that one request has one id in both logs."""
    ((pattern, _), _) = (
        (line["directive"], line["args"])
        for each in directives
        if each["directive"] == "map" and each["args"] == ["$http_x_request_id", "$edge_request_id"]
        for line in each["block"]
    )

    assert pattern == f"~^{forwarding._REQUEST_ID.pattern.decode()}$"


def test_edge_exposes_what_the_proxy_serves(directives: list[dict[str, Any]]) -> None:
    """The paths handed on are the proxy's public ones and the agent's, and no other."""
    handed_on = {
        each["args"][-1]
        for each in directives
        if each["directive"] == "location" and any(line["directive"] == "proxy_pass" for line in each["block"])
    }

    assert handed_on == {*PUBLIC, "/agent/", "/agent/v1/files/upload"}


def test_edge_and_containers_agree_on_addresses(directives: list[dict[str, Any]]) -> None:
    """Nginx listens where the compose file publishes it, and finds the proxy under its name and port."""
    nginx, proxy = compose("nginx"), compose("proxy")

    assert arguments(directives, "listen")[0][0] == nginx["ports"][0].split(":-")[-1].rstrip("}")
    assert [args[0] for args in arguments(directives, "server") if args] == [
        f"proxy:{proxy['environment']['PROXY_PORT']}"
    ]
