"""As much of kustomize as deploy/kubernetes uses: resources, components, strategic merge patches, images, a namespace.

A test holds it against kubectl's own where there is one.
"""

from pathlib import Path
from typing import Any

import yaml

KUBERNETES = Path(__file__).parents[2] / "deploy" / "kubernetes"
KNOWN = frozenset({"apiVersion", "kind", "namespace", "resources", "components", "patches", "images"})
CLUSTER_WIDE = frozenset({"Namespace"})
type Manifest = dict[str, Any]


def render(directory: Path) -> list[Manifest]:
    """Give the manifests that `kubectl apply -k` would send."""
    return _kustomize(directory, [])


def find(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    """Give the one of this kind and name."""
    (found,) = (each for each in manifests if (each["kind"], each["metadata"]["name"]) == (kind, name))
    return found


def _kustomize(directory: Path, manifests: list[Manifest]) -> list[Manifest]:
    file: Manifest = yaml.safe_load((directory / "kustomization.yaml").read_text())
    unknown = file.keys() - KNOWN
    assert not unknown, f"{directory.name}: this kustomize does not know {unknown}"
    for resource in file.get("resources", []):
        path = directory / resource
        manifests = manifests + (_kustomize(path, []) if path.is_dir() else list(yaml.safe_load_all(path.read_text())))
    for component in file.get("components", []):
        manifests = _kustomize(directory / component, manifests)
    for patch in file.get("patches", []):
        over = yaml.safe_load((directory / patch["path"]).read_text())
        under = find(manifests, over["kind"], over["metadata"]["name"])
        manifests[manifests.index(under)] = _over(under, over)
    for image in file.get("images", []):
        manifests = [_renamed(manifest, image) for manifest in manifests]
    if "namespace" in file:
        for manifest in manifests:
            if manifest["kind"] not in CLUSTER_WIDE:
                manifest["metadata"]["namespace"] = file["namespace"]
    return manifests


def _over(under: Any, over: Any) -> Any:
    if isinstance(under, dict) and isinstance(over, dict):
        return under | {key: _over(under.get(key), value) for key, value in over.items()}
    if _is_named(under) and _is_named(over):
        patched = {each["name"]: each for each in under}
        for each in over:
            patched[each["name"]] = _over(patched.get(each["name"]), each)
        return list(patched.values())
    return over


def _is_named(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) and "name" in each for each in value)


def _renamed(value: Any, image: dict[str, str]) -> Any:
    if isinstance(value, list):
        return [_renamed(each, image) for each in value]
    if not isinstance(value, dict):
        return value
    renamed = {key: _renamed(each, image) for key, each in value.items()}
    if value.get("image") == image["name"]:
        renamed["image"] = f"{image['newName']}:{image['newTag']}"
    return renamed
