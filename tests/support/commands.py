"""Runs the real command `agentflow-proxy` as an operator would, and reads what it prints.

It never passes the caller's own environment on.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Operator:
    """Somebody at a shell, before the key store at `url`; the audit log goes to `audit`. `redis` is a URL too."""

    url: str
    directory: Path
    redis: str = ""

    @property
    def audit(self) -> Path:
        """Give the file of the audit log."""
        return self.directory / "audit.log"

    def environment(self) -> dict[str, str]:
        """Give what a proxy before the same store is to be told."""
        variables = {"PROXY_DATABASE_URL": self.url, "PROXY_AUDIT_FILE": str(self.audit)}
        return variables | {"PROXY_REDIS_URL": self.redis} if self.redis else variables

    def run(self, *words: str, text: str = "") -> subprocess.CompletedProcess[str]:
        """Run one command to its end."""
        return subprocess.run(
            [Path(sys.executable).with_name("agentflow-proxy"), *words],
            cwd=self.directory,
            env={"PATH": os.defpath, "HOME": str(self.directory), "USER": "olga", **self.environment()},
            input=text,
            capture_output=True,
            text=True,
            check=False,
        )

    def keys(self, *words: str) -> Any:
        """Run one of the key commands, which must do, and read its JSON."""
        done = self.run("keys", *words, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def audited(self) -> list[dict[str, Any]]:
        """Read the audit log."""
        return [json.loads(line) for line in self.audit.read_text().splitlines()]
