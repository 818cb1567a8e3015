"""The compose file holds the deployment's promises: who can be reached, by whom, and with which rights.

No engine is started; the file is read as the specification and the two programs' own settings read it.
"""

import json
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jsonschema
import pytest
import yaml

from agent_service.settings import read_settings
from proxy.authentication import PUBLIC
from proxy.environment import load
from proxy.operations import OPERATIONS
from tests.support.compose import (
    BASE,
    DEPLOY,
    OBSERVE,
    PROVIDER,
    REFERENCE,
    SCALE,
    environment,
    interpolated,
    merged,
    read,
)

FILES = [BASE, OBSERVE, PROVIDER, SCALE]
SERVICES = ["nginx", "proxy", "agent"]
SETUPS = ["agent-setup", "proxy-setup"]
WATCHERS = ["prometheus", "grafana"]
SCALED = [*SERVICES, "balancer", *SETUPS, "postgres", "redis"]
PROVISIONING = DEPLOY / "grafana" / "provisioning"
EXAMPLE = re.compile(r"^# (?P<name>[A-Z][A-Z0-9_]*)=(?P<default>.*)$", re.MULTILINE)


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """Give the deployment."""
    return read(BASE)


@pytest.fixture(scope="module")
def scaled() -> dict[str, Any]:
    """Give the deployment with several agents and proxies."""
    return merged(BASE, SCALE)


@pytest.fixture(scope="module")
def observed() -> dict[str, Any]:
    """Give all of it, watched."""
    return merged(BASE, SCALE, OBSERVE)


@pytest.fixture(scope="module")
def provider() -> dict[str, Any]:
    """Give what is laid over it for a real provider."""
    return read(PROVIDER)


def with_secrets(variables: dict[str, str], directory: Path, **contents: str) -> dict[str, str]:
    """Write the secrets, and let the variables name them there and not where the container has them."""
    for name, content in contents.items():
        (directory / name).write_text(f"{content}\n")
    return {name: value.replace("/run/secrets", str(directory)) for name, value in variables.items()}


@pytest.mark.parametrize("name", FILES)
def test_specification_accepts_the_file(name: str) -> None:
    """The file is what the Compose Specification's own JSON schema allows."""
    vendored = files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"
    schema = json.loads(vendored.read_text())

    faults = [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(read(name))]

    assert faults == []


def test_only_nginx_is_published(compose: dict[str, Any]) -> None:
    """One port of one service is open to the outside, by default nginx's 8080."""
    published = {name: service.get("ports", []) for name, service in compose["services"].items()}

    assert sorted(published) == sorted(SERVICES)
    assert published.pop("proxy") == published.pop("agent") == []
    assert [interpolated(port) for port in published.pop("nginx")] == ["8080:8080"]


def test_agent_meets_nobody_but_the_proxy(compose: dict[str, Any], provider: dict[str, Any]) -> None:
    """The agent's network has no way out and nginx is not on it; a provider's way out is the agent's alone."""
    networks = {name: service["networks"] for name, service in compose["services"].items()}

    assert networks == {"nginx": ["edge"], "proxy": ["edge", "agents"], "agent": ["agents"]}
    assert compose["networks"] == {"edge": {}, "agents": {"internal": True}}
    assert list(provider["services"]) == ["agent"]
    assert provider["services"]["agent"]["networks"] == ["agents", "egress"]
    assert provider["services"]["agent"].keys() == {"networks", "environment", "secrets"}


@pytest.mark.parametrize("name", [*SCALED, *WATCHERS])
def test_service_has_no_more_rights_than_it_needs(observed: dict[str, Any], name: str) -> None:
    """A service that is taken over finds no root, no capability, no file to change and no end to its means."""
    service = observed["services"][name]

    assert re.fullmatch(r"[1-9]\d*:(0|[1-9]\d*)", service["user"])
    assert service["user"].endswith(":0") == (name == "grafana")  # whose image gives its files to that group
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["deploy"]["resources"]["limits"].keys() == {"cpus", "memory", "pids"}
    assert "/tmp" in [mount.partition(":")[0] for mount in service["tmpfs"]]  # noqa: S108  the container's
    assert {mount["type"] for mount in service.get("volumes", []) if not mount.get("read_only")} <= {"volume"}
    forbidden = {"cap_add", "privileged", "network_mode", "pid", "ipc", "userns_mode", "devices", "env_file"}
    assert not forbidden & service.keys()


@pytest.mark.parametrize("name", SERVICES)
def test_service_comes_back_and_can_take_its_leave(compose: dict[str, Any], name: str) -> None:
    """Every service is restarted, watched, and given time to end what runs; nobody starts before whom it needs."""
    service = compose["services"][name]

    assert service["restart"] == "unless-stopped"
    assert service["stop_signal"] == ("SIGQUIT" if name == "nginx" else "SIGTERM")
    assert {"test", "interval", "timeout", "retries", "start_period"} <= service["healthcheck"].keys()
    assert {need["condition"] for need in service.get("depends_on", {}).values()} <= {"service_healthy"}
    assert list(service.get("depends_on", {})) == {"nginx": ["proxy"], "proxy": ["agent"], "agent": []}[name]


def test_scaling_publishes_nothing_more(scaled: dict[str, Any]) -> None:
    """Still one port of one service is open; threads, keys and counts are on a network that leads nowhere."""
    services = scaled["services"]
    members = {
        network: sorted(name for name, service in services.items() if network in service["networks"])
        for network in scaled["networks"]
    }

    assert sorted(services) == sorted(SCALED)
    assert [name for name, service in services.items() if "ports" in service] == ["nginx"]
    assert members == {
        "edge": ["nginx", "proxy"],
        "agents": ["agent", "balancer", "proxy"],
        "data": ["agent", "agent-setup", "postgres", "proxy", "proxy-setup", "redis"],
    }
    assert [name for name, network in scaled["networks"].items() if not network.get("internal")] == ["edge"]


def test_setups_are_done_before_whoever_needs_them(scaled: dict[str, Any]) -> None:
    """Each set-up command runs once, to its end, after the database and before the first of its tier."""
    services = scaled["services"]

    assert [services[name]["command"] for name in SETUPS] == [
        ["python", "-m", "agent_service.checkpoints"],
        ["agentflow-proxy", "migrate"],
    ]
    for name, tier in zip(SETUPS, ("agent", "proxy"), strict=True):
        assert services[tier]["depends_on"][name] == {"condition": "service_completed_successfully"}
        assert services[name]["depends_on"]["postgres"] == {"condition": "service_healthy"}
        assert (services[name]["image"], services[name]["user"]) == (services[tier]["image"], services[tier]["user"])
        assert set(services[name]["secrets"]) < set(services[tier]["secrets"])
        assert services[name]["restart"].startswith("on-failure")


def test_metrics_are_asked_for_and_shown(observed: dict[str, Any]) -> None:
    """Prometheus asks where every proxy serves, with our alerts; Grafana asks it, and has our dashboard."""
    services = observed["services"]
    members = {
        network: sorted(name for name, service in services.items() if network in service["networks"])
        for network in ("metrics", "viewers")
    }
    settings = environment(services["proxy"])
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    (source,) = yaml.safe_load((PROVISIONING / "datasources" / "prometheus.yml").read_text())["datasources"]
    (folder,) = yaml.safe_load((PROVISIONING / "dashboards" / "agentflow-proxy.yml").read_text())["providers"]
    alerts = (DEPLOY / "prometheus" / "alerts.yml").read_text()
    mounted = {mount["source"]: mount["target"] for name in WATCHERS for mount in services[name]["volumes"]}

    assert members == {"metrics": ["grafana", "prometheus", "proxy"], "viewers": ["grafana"]}
    assert observed["networks"]["metrics"] == {"internal": True}
    assert [name for name, service in services.items() if "ports" in service] == ["nginx", "grafana"]
    assert [interpolated(port) for port in services["grafana"]["ports"]] == ["127.0.0.1:3000:3000"]
    assert job["dns_sd_configs"] == [{"names": ["proxy"], "type": "A", "port": int(settings["PROXY_METRICS_PORT"])}]
    assert set(re.findall(r'job="([^"]+)"', alerts)) == {job["job_name"]}
    assert config["rule_files"] == ["alerts.yml"]
    assert source["url"] == "http://prometheus:9090"
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]
    assert mounted["./grafana/agentflow-proxy.json"].rpartition("/")[0] == folder["options"]["path"]
    assert (mounted["./prometheus"], mounted["./grafana/provisioning"]) == (
        "/etc/prometheus",
        "/etc/grafana/provisioning",
    )
    assert [path for path in _paths(observed) if not path.exists()] == []


def test_several_of_a_tier_can_run(scaled: dict[str, Any]) -> None:
    """`--scale` works for agents and proxies: no name, port or file of theirs can be had only once."""
    for name in ("agent", "proxy"):
        service = scaled["services"][name]
        assert not {"container_name", "ports", "hostname"} & service.keys()
    assert environment(scaled["services"]["proxy"])["PROXY_AGENT_URL"] == "http://balancer:8001"
    assert environment(scaled["services"]["agent"])["ALLOWED_HOST"].split(",") == ["agent", "balancer", "127.0.0.1"]


def test_health_checks_ask_what_is_served(compose: dict[str, Any]) -> None:
    """Each health check asks a path that its service answers without a credential, where it listens."""
    probed = {
        name: urlsplit(re.findall(r"http://[^\s\"')]+", " ".join(service["healthcheck"]["test"]))[0])
        for name, service in compose["services"].items()
    }

    assert {name: url.netloc for name, url in probed.items()} == {
        "nginx": "127.0.0.1:8080",
        "proxy": f"127.0.0.1:{environment(compose['services']['proxy'])['PROXY_PORT']}",
        "agent": "127.0.0.1:8001",
    }
    assert f"location = {probed['nginx'].path} {{" in (DEPLOY / "nginx.conf").read_text()
    assert probed["proxy"].path == "/health/ready"
    assert probed["proxy"].path in PUBLIC
    assert probed["agent"].path in {row.upstream for row in OPERATIONS}


def test_proxy_starts_with_these_settings(compose: dict[str, Any], tmp_path: Path) -> None:
    """The proxy accepts its whole environment as it is by default, and reaches the agent by its name."""
    variables = with_secrets(
        environment(compose["services"]["proxy"]),
        tmp_path,
        agent_secret="a" * 48,
        thread_secret="t" * 48,
        jwt_secret="j" * 48,
        api_keys="keys = []",
    )

    settings = load(variables)

    assert settings.agent_url == "http://agent:8001"
    assert (settings.host, settings.port, settings.trusted_hops) == ("0.0.0.0", 8000, 1)  # noqa: S104  as meant


def test_the_key_store_outlives_the_proxy(compose: dict[str, Any]) -> None:
    """The database that the example names is in a volume, which the image's user owns."""
    (mount,) = compose["services"]["proxy"]["volumes"]
    example = (DEPLOY / "env.example").read_text()
    user = compose["services"]["proxy"]["user"].partition(":")[0]
    dockerfile = (DEPLOY / "proxy.Dockerfile").read_text()
    (address,) = re.findall(r"sqlite\+aiosqlite:///(\S+)", example)

    assert (mount["type"], mount["source"] in compose["volumes"]) == ("volume", True)
    assert Path(address).parent == Path(mount["target"])
    assert f'"-o", "{user}", "-g", "{user}", "{mount["target"]}"' in dockerfile
    assert f"sqlite+aiosqlite:///{address}" in (DEPLOY / "README.md").read_text()


def test_agent_starts_with_these_settings(compose: dict[str, Any], provider: dict[str, Any]) -> None:
    """The agent accepts its environment as it is by default, and with a provider laid over it."""
    alone = environment(compose["services"]["agent"]) | {"JWT_SECRET_KEY": "a" * 48}
    asked = {"AGENT_MODEL": "openai/some", "OPENAI_API_KEY": "k"}

    local = read_settings(alone)
    remote = read_settings(alone | environment(provider["services"]["agent"]) | asked)

    assert (local.model, remote.model, remote.base_url) == ("local", "openai/some", None)


def test_proxy_and_agent_agree_on_the_internal_token(compose: dict[str, Any]) -> None:
    """Issuer, audience and secret of the internal token are the same at both ends."""
    proxy, agent = (environment(compose["services"][name]) for name in ("proxy", "agent"))

    assert proxy["PROXY_AGENT_ISSUER"] == agent["JWT_ISSUER"]
    assert proxy["PROXY_AGENT_AUDIENCE"] == agent["JWT_AUDIENCE"]
    assert proxy["PROXY_AGENT_SECRET_FILE"] == agent["JWT_SECRET_KEY_FILE"]


@pytest.mark.parametrize("name", FILES)
def test_secrets_are_files_that_git_ignores(name: str) -> None:
    """No secret is a variable; each is a file the README tells how to make, mounted where it is named."""
    file = read(name)
    readme = (DEPLOY / "README.md").read_text()
    used: set[str] = set()

    for service in file["services"].values():
        variables = service.get("environment", {})
        named = {value for key, value in variables.items() if key.endswith("_FILE")}
        assert not [key for key in variables if re.search(r"(SECRET|PASSWORD|TOKEN|KEYS?)$", key)]
        assert named == {f"/run/secrets/{secret}" for secret in service.get("secrets", [])} & named
        used |= set(service.get("secrets", []))

    known = read(BASE)["secrets"] | file["secrets"]
    assert used <= known.keys()
    assert file["secrets"].keys() <= used
    for secret in file["secrets"].values():
        assert secret["file"].startswith("./secrets/")
        assert Path(secret["file"]).name in readme
    assert (DEPLOY / "secrets" / ".gitignore").read_text() == "*\n!.gitignore\n"
    assert (DEPLOY / "tls" / ".gitignore").read_text() == "*\n!.gitignore\n"


def test_every_variable_is_in_the_example() -> None:
    """env.example shows each variable of the compose files, no other, with the default it has there."""
    shown = {match["name"]: match["default"] for match in EXAMPLE.finditer((DEPLOY / "env.example").read_text())}
    used: dict[str, set[str]] = {}
    for name in FILES:
        for match in REFERENCE.finditer((DEPLOY / name).read_text()):
            used.setdefault(match["name"], set()).add(match["default"] or "")

    assert shown.keys() == used.keys()
    assert {name for name, default in shown.items() if default not in used[name]} == set()


def test_named_files_are_there(compose: dict[str, Any]) -> None:
    """What is built from or mounted is in the repository."""
    assert [path for path in _paths(compose) if not path.exists()] == []


def _paths(compose: dict[str, Any]) -> Iterator[Path]:
    for service in compose["services"].values():
        if "build" in service:
            yield DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]
        for mount in service.get("volumes", []):
            if mount["type"] == "bind":
                yield DEPLOY / mount["source"]
