"""The Kubernetes manifests are valid, keep the deployment's promises, and fit what the two programs do.

No cluster is asked; the manifests are read as kubectl's own kustomize lays them together, for either size.
"""

from pathlib import Path
from typing import Any

import crossplane  # type: ignore[import-untyped]
import kubernetes_validate  # type: ignore[import-untyped]
import pytest

from agent_service.serve import SETTLE_SECONDS
from agent_service.settings import read_settings
from proxy.authentication import PUBLIC
from proxy.environment import load
from proxy.families import FAMILIES, PREFIX
from proxy.operations import OPERATIONS
from tests.support.kustomize import KUBERNETES, Manifest, find, render
from tests.support.nginx import CONFIG

OVERLAYS = ["small", "large"]
TIERS = ["agent", "proxy"]
RESTRICTED = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
USERS = {"agent": 10002, "proxy": 10001}


@pytest.fixture(scope="module", params=OVERLAYS)
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    """Give the manifests of one size."""
    return render(KUBERNETES / "overlays" / request.param)


def pods(manifests: list[Manifest]) -> dict[str, dict[str, Any]]:
    """Give every pod's specification, by the name of what makes it."""
    return {
        each["metadata"]["name"]: each["spec"]["template"]["spec"] for each in manifests if "template" in spec(each)
    }


def spec(manifest: Manifest) -> dict[str, Any]:
    """Give a manifest's specification, if it has one."""
    value: dict[str, Any] = manifest.get("spec", {})
    return value


def test_schemas_of_kubernetes_accept_every_manifest(manifests: list[Manifest]) -> None:
    """Each is what the newest release that we have schemas of takes, with no field that it does not know."""
    version = kubernetes_validate.latest_version()

    validated = [kubernetes_validate.validate(each, version, strict=True) for each in manifests]

    assert tuple(map(int, version.split(".")[:2])) >= (1, 34)
    assert len(validated) == len(manifests) > 10


def test_every_pod_is_restricted(manifests: list[Manifest]) -> None:
    """The namespace enforces the restricted profile, and each pod is stricter still: no file to change, no account."""
    (namespace,) = (each for each in manifests if each["kind"] == "Namespace")

    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert sorted(pods(manifests)) == ["agent", "agent-setup", "proxy", "proxy-setup"]
    for name, pod in pods(manifests).items():
        (container,) = pod["containers"]
        security = pod["securityContext"]
        assert pod["automountServiceAccountToken"] is pod["enableServiceLinks"] is False
        assert (security["runAsNonRoot"], security["runAsUser"]) == (True, USERS[name.partition("-")[0]])
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == RESTRICTED
        assert container["resources"]["limits"].keys() == {"memory"}
        assert container["resources"]["requests"].keys() == {"cpu", "memory"}
        assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & pod.keys()
        assert {next(iter(volume.keys() - {"name"})) for volume in pod["volumes"]} == {"secret", "emptyDir"}


def test_secrets_are_only_referred_to(manifests: list[Manifest]) -> None:
    """No manifest holds a secret; each is a file of a Secret that the operator makes, and the README says how."""
    readme = (KUBERNETES / "README.md").read_text()

    assert not [each for each in manifests if each["kind"] == "Secret"]
    for name, pod in pods(manifests).items():
        (secret,) = (volume["secret"] for volume in pod["volumes"] if "secret" in volume)
        (container,) = pod["containers"]
        (mount,) = (mount for mount in container["volumeMounts"] if mount["name"] == "secrets")
        variables = {each["name"]: each["value"] for each in container.get("env", [])}
        for source in container.get("envFrom", []):
            variables |= find(manifests, "ConfigMap", source["configMapRef"]["name"])["data"]
        files = {value for variable, value in variables.items() if variable.endswith("_FILE")}
        assert mount["readOnly"] is True
        assert secret["defaultMode"] == 0o440
        assert {path.rpartition("/")[0] for path in files} == {mount["mountPath"]}
        assert not [path for path in files if f"--from-file={Path(path).name}=" not in readme]
        assert secret["secretName"] in readme
        assert all(item["key"] == item["path"] for item in secret.get("items", []))
        assert (sorted(item["key"] for item in secret["items"]) if "setup" in name else []) == sorted(
            Path(path).name for path in files if "setup" in name
        )


def test_nobody_reaches_anybody_but_as_said(manifests: list[Manifest]) -> None:
    """All traffic is refused but from the edge to proxies, from proxies to agents, and to the stores and names."""
    policies = {each["metadata"]["name"]: each["spec"] for each in manifests if each["kind"] == "NetworkPolicy"}
    everybody: dict[str, object] = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}

    def allowed(name: str, direction: str, peer: str) -> list[tuple[Any, list[int]]]:
        return [(rule[peer], [port["port"] for port in rule["ports"]]) for rule in policies[name].get(direction, [])]

    edge = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ingress-nginx"}}}]
    proxies, agents = (
        [{"podSelector": {"matchLabels": {"app.kubernetes.io/name": name}}}] for name in ("proxy", "agent")
    )
    assert policies.pop("nobody") == everybody
    assert policies.keys() == {"proxy", "agent", "stores"}
    for name in ("proxy", "agent"):
        assert policies[name]["podSelector"] == {"matchLabels": {"app.kubernetes.io/name": name}}
        assert policies[name]["policyTypes"] == ["Ingress", "Egress"]
    watchers = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "observability"}}}]
    assert allowed("proxy", "ingress", "from") == [(edge, [8000]), (watchers, [9464])]
    assert allowed("proxy", "egress", "to") == [(agents, [8001])]
    assert allowed("agent", "ingress", "from") == [(proxies, [8001])]
    assert allowed("agent", "egress", "to") == []
    assert policies["stores"]["policyTypes"] == ["Egress"]
    assert [ports for _, ports in allowed("stores", "egress", "to")] == [[5432, 6379], [4318], [53, 53]]
    assert all("namespaceSelector" in peer for peers, _ in allowed("stores", "egress", "to") for peer in peers)


def test_pods_are_given_the_time_their_drain_takes(manifests: list[Manifest]) -> None:
    """No pod is killed while it still waits to be forgotten, or lets answers end."""
    data = find(manifests, "ConfigMap", "proxy")["data"]
    proxy, agent = (pods(manifests)[name] for name in ("proxy", "agent"))
    (container,) = agent["containers"]
    (grace,) = (int(word.removeprefix("--grace=")) for word in container["args"] if word.startswith("--grace="))
    slept = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    waited = float(data["PROXY_DRAIN_DELAY_SECONDS"])

    assert proxy["terminationGracePeriodSeconds"] > waited + float(data["PROXY_GRACE_SECONDS"]) + 3
    assert agent["terminationGracePeriodSeconds"] > slept + SETTLE_SECONDS[1] + grace
    assert grace >= float(data["PROXY_GRACE_SECONDS"])
    (probed,) = proxy["containers"]
    # Unready long enough for its probe to notice, whether or not the endpoint's own ending was told in time.
    assert waited > probed["readinessProbe"]["periodSeconds"] * probed["readinessProbe"]["failureThreshold"]


def test_probes_ask_what_is_served(manifests: list[Manifest]) -> None:
    """Each asks a path that is answered without a credential, under a host name that is let in."""
    for tier in TIERS:
        (container,) = pods(manifests)[tier]["containers"]
        asked = {kind: container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")}
        assert {probe["port"] for probe in asked.values()} == {"http"}
        assert {port["name"] for port in container["ports"]} - {"metrics"} == {"http"}
        if tier == "proxy":
            assert {probe["path"] for probe in asked.values()} <= set(PUBLIC)
            assert asked["readiness"]["path"] == "/health/ready"
        else:
            hosts = find(manifests, "ConfigMap", "agent")["data"]["ALLOWED_HOST"].split(",")
            assert {probe["path"] for probe in asked.values()} <= {row.upstream for row in OPERATIONS}
            assert all(probe["httpHeaders"][0]["value"] in hosts for probe in asked.values())


def test_tiers_scale_and_are_never_all_taken_away(manifests: list[Manifest]) -> None:
    """Each has an autoscaler that decides how many, never fewer than two, and a budget for what may be taken away."""
    for tier in TIERS:
        scaler = find(manifests, "HorizontalPodAutoscaler", tier)["spec"]
        deployment = find(manifests, "Deployment", tier)["spec"]
        budget = find(manifests, "PodDisruptionBudget", tier)["spec"]
        service = find(manifests, "Service", tier)["spec"]
        labels = deployment["template"]["metadata"]["labels"]
        assert "replicas" not in deployment
        assert deployment["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
        assert scaler["scaleTargetRef"]["name"] == tier
        assert 2 <= scaler["minReplicas"] < scaler["maxReplicas"]
        assert budget["maxUnavailable"] == 1
        assert budget["selector"] == deployment["selector"]
        assert service["selector"] == deployment["selector"]["matchLabels"]
        assert service["selector"].items() <= labels.items()
    (runs,) = find(manifests, "HorizontalPodAutoscaler", "agent")["spec"]["metrics"]
    (cpu,) = find(manifests, "HorizontalPodAutoscaler", "proxy")["spec"]["metrics"]
    assert runs["external"]["metric"] == {"name": "agent_proxy_runs_in_flight"}
    assert cpu["resource"]["name"] == "cpu"


def test_autoscaler_and_prometheus_find_what_proxies_export(manifests: list[Manifest]) -> None:
    """The metric that scales agents is one of ours, a gauge; its port is open where the proxy serves it."""
    (metric,) = find(manifests, "HorizontalPodAutoscaler", "agent")["spec"]["metrics"]
    name = metric["external"]["metric"]["name"]
    data = find(manifests, "ConfigMap", "proxy")["data"]
    (container,) = pods(manifests)["proxy"]["containers"]
    ports = {port["name"]: str(port["containerPort"]) for port in container["ports"]}

    assert FAMILIES[name.removeprefix(PREFIX)].kind == "gauge"
    assert name in (KUBERNETES / "README.md").read_text()
    assert name in (KUBERNETES.parents[1] / "docs" / "scaling.md").read_text()
    assert (data["PROXY_METRICS_HOST"], data["PROXY_METRICS_PORT"]) == ("0.0.0.0", ports["metrics"])  # noqa: S104  as meant


def test_images_are_the_overlays_own(manifests: list[Manifest]) -> None:
    """No pod runs an image without a registry and a version; a set-up runs its tier's own."""
    images = {name: pod["containers"][0]["image"] for name, pod in pods(manifests).items()}

    assert all(image.count("/") and not image.endswith((":latest", ":")) for image in images.values())
    assert all(images[f"{tier}-setup"] == images[tier] for tier in TIERS)


def test_programs_start_with_these_settings(manifests: list[Manifest], tmp_path: Path) -> None:
    """Both accept their whole environment, and agree on the internal token and on each other's names."""
    made = {name: name[0] * 48 for name in ("agent_secret", "thread_secret", "jwt_secret")}
    made |= {
        "database_url": "postgresql+asyncpg://u@h/d",
        "postgres_dsn": "postgresql://u@h/d",
        "redis_url": "redis://h",
    }
    for name, content in made.items():
        (tmp_path / name).write_text(content)
    proxy, agent = (find(manifests, "ConfigMap", name)["data"] for name in ("proxy", "agent"))
    here = {name: value.replace("/run/secrets/proxy", str(tmp_path)) for name, value in proxy.items()}
    taken = {name.removesuffix("_FILE"): made.get(Path(value).name, value) for name, value in agent.items()}
    taken["JWT_SECRET_KEY"] = made["agent_secret"]

    settings = load(here)
    read = read_settings(taken)

    assert settings.agent_url == "http://agent:8001"
    assert (settings.agent_issuer, settings.agent_audience) == (agent["JWT_ISSUER"], agent["JWT_AUDIENCE"])
    assert type(read.storage).__name__ == "PostgresWithRedis"
    assert "agent" in agent["ALLOWED_HOST"].split(",")
    assert agent["MODE"] == "production"


def test_ingress_exposes_what_the_edge_does(manifests: list[Manifest]) -> None:
    """The same paths as nginx.conf, over TLS only, with nothing of a stream held back and no run sent twice."""
    ingress = find(manifests, "Ingress", "edge")
    (rule,) = ingress["spec"]["rules"]
    paths = {(path["path"], path["pathType"]) for path in rule["http"]["paths"]}
    ours = {name.rpartition("/")[2]: value for name, value in ingress["metadata"]["annotations"].items()}
    edge = {line["directive"]: line["args"] for line in _http_block()}

    assert paths == {("/agent/", "Prefix"), *((path, "Exact") for path in PUBLIC)}
    assert rule["host"] in ingress["spec"]["tls"][0]["hosts"]
    assert ours["ssl-redirect"] == "true"
    assert {ours["proxy-request-buffering"], ingress["metadata"]["annotations"]["nginx.org/proxy-buffering"]} == {
        "off",
        "false",
    }
    assert ours["proxy-next-upstream"].split() == edge["proxy_next_upstream"] == ["error", "timeout"]
    assert ours["websocket-services"] == "proxy"
    # An Ingress has one limit for all paths: that of files. The proxy has its own for whatever else.
    (uploads,) = (each for each in _locations() if each["args"][-1] == "/agent/v1/files/upload")
    (most,) = (line["args"] for line in uploads["block"] if line["directive"] == "client_max_body_size")
    assert [ours["client-max-body-size"]] == [ours["proxy-body-size"]] == most


def _http_block() -> list[dict[str, Any]]:
    parsed: list[dict[str, Any]] = crossplane.parse(str(CONFIG))["config"][0]["parsed"]
    (block,) = (each["block"] for each in parsed if each["directive"] == "http")
    lines: list[dict[str, Any]] = block
    return lines


def _locations() -> list[dict[str, Any]]:
    (server,) = (each["block"] for each in _http_block() if each["directive"] == "server")
    return [each for each in server if each["directive"] == "location"]
