"""Lays the Kubernetes manifests together, by the kustomize that kubectl has in it. No cluster is asked."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

KUBERNETES = Path(__file__).parents[2] / "deploy" / "kubernetes"
KUBECTL = Path(sys.executable).with_name("kubectl")
DEADLINE = 30.0
type Manifest = dict[str, Any]


def render(directory: Path) -> list[Manifest]:
    """Give the manifests that `kubectl apply -k` would send."""
    made = subprocess.run([KUBECTL, "kustomize", directory], stdout=subprocess.PIPE, check=True, timeout=DEADLINE)
    return list(yaml.safe_load_all(made.stdout))


def find(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    """Give the one of this kind and name."""
    (found,) = (each for each in manifests if (each["kind"], each["metadata"]["name"]) == (kind, name))
    return found
