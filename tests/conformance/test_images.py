"""The images hold what they run and nothing more, and run it without root.

No engine is started; the Dockerfiles are read, and the agent's entrypoint is run as it is.
"""

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.support.compose import BASE, SCALE, merged

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
ENTRYPOINT = DEPLOY / "agent-entrypoint.sh"
IMAGES = ["proxy", "agent"]


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction of a Dockerfile, its continued lines joined."""

    name: str
    arguments: str


def stages(image: str) -> list[list[Instruction]]:
    """Read a Dockerfile, a list a stage."""
    text = (DEPLOY / f"{image}.Dockerfile").read_text()
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
    found: list[list[Instruction]] = []
    for line in lines[next(number for number, line in enumerate(lines) if line.startswith("FROM")) :]:
        name, _, arguments = line.partition(" ")
        if name == "FROM":
            found.append([])
        found[-1].append(Instruction(name, arguments.strip()))
    return found


def last(stage: list[Instruction], name: str) -> str:
    """Give the arguments of the last instruction of this name."""
    return [each.arguments for each in stage if each.name == name][-1]


def command(arguments: str) -> list[str]:
    """Read an exec form; a shell form is a JSON error."""
    words: list[str] = json.loads(arguments)
    return words


@pytest.mark.parametrize("image", IMAGES)
def test_final_stage_builds_nothing(image: str) -> None:
    """What builds stays behind in the first stage; both start from the project's Python, slim, or a pinned one."""
    first, final = stages(image)
    base = f"python:{(ROOT / '.python-version').read_text().strip()}-slim"
    builds = [service["build"] for service in merged(BASE, SCALE)["services"].values() if "build" in service]

    assert [last(stage, "FROM").split()[0] for stage in (first, final)] == ["${PYTHON_IMAGE}"] * 2
    assert f"ARG PYTHON_IMAGE={base}\n" in (DEPLOY / f"{image}.Dockerfile").read_text()
    assert {build["args"]["PYTHON_IMAGE"] for build in builds} == {f"${{PYTHON_IMAGE:-{base}}}"}
    assert not [each for each in final if each.name == "RUN" and re.search("pip|apt", each.arguments)]


@pytest.mark.parametrize("image", IMAGES)
def test_only_pinned_packages_are_installed(image: str) -> None:
    """Every package has a hash and comes built; the project itself comes without others."""
    lines = [command(each.arguments) for each in stages(image)[0] if each.name == "RUN"]
    installs = [words[words.index("install") + 1 :] for words in lines if "install" in words]
    (wheel,) = (words for words in lines if "wheel" in words)
    pinned = ["--require-hashes", "--only-binary", ":all:", "-r"]

    assert installs[0] == ["--no-compile", *pinned, f"requirements/{image}.txt"]
    assert installs[1] == [*pinned, "requirements/build.txt"]
    assert installs[2][:3] == ["--no-compile", "--no-deps", "--no-index"]
    assert {"--no-deps", "--no-build-isolation"} <= set(wheel)
    assert len(installs) == 3


@pytest.mark.parametrize("image", IMAGES)
def test_compiled_modules_hold_no_times(image: str) -> None:
    """Two builds of the same files are alike: what is compiled knows its source by hash, and is compiled in order."""
    runs = [command(each.arguments) for each in stages(image)[0] if each.name == "RUN"]

    assert runs[-1] == ["python", "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", "/opt/venv/lib"]


@pytest.mark.parametrize("image", IMAGES)
def test_only_an_interpreter_built_for_speed_will_do(image: str) -> None:
    """The build stops where the base image's Python was made without profiles (PGO), which costs a fifth."""
    checks = [command(each.arguments)[-1] for each in stages(image)[0] if "sysconfig" in each.arguments]

    assert len(checks) == 1
    assert "assert '--enable-optimizations' in sysconfig.get_config_var('CONFIG_ARGS')" in checks[0]


@pytest.mark.parametrize("image", IMAGES)
def test_image_runs_as_its_compose_user(image: str) -> None:
    """The image names the same numeric user as the compose file, and stops on SIGTERM, without a shell between."""
    final = stages(image)[-1]
    service = yaml.safe_load((DEPLOY / "docker-compose.yml").read_text())["services"][image]

    assert last(final, "USER") == service["user"]
    assert last(final, "STOPSIGNAL") == service["stop_signal"] == "SIGTERM"
    assert command(last(final, "CMD")) == service.get("command", command(last(final, "CMD")))
    assert command(last(final, "HEALTHCHECK").split("CMD")[1])[:2] == ["python", "-c"]
    shells = [each.arguments for stage in stages(image) for each in stage if each.name == "RUN"]
    assert all(command(arguments) for arguments in shells)


@pytest.mark.parametrize("image", IMAGES)
def test_everything_copied_is_let_in(image: str) -> None:
    """What is copied is there, and is what .dockerignore lets into the build; all else it keeps out."""
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    let_in = {line[1:] for line in ignored if line.startswith("!")}
    copied = [
        word
        for stage in stages(image)
        for each in stage
        if each.name == "COPY" and "--from=" not in each.arguments
        for word in each.arguments.split()[:-1]
        if not word.startswith("--")
    ]

    assert next(line for line in ignored if line and line[0] not in "#!") == "*"
    assert [word for word in copied if not (ROOT / word).exists()] == []
    assert [word for word in copied if word not in let_in and word.split("/")[0] not in let_in] == []


def run_entrypoint(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the agent's entrypoint with this command and only these variables."""
    return subprocess.run(
        ["/bin/sh", ENTRYPOINT, *words],
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )


def test_entrypoint_turns_files_into_variables(tmp_path: Path) -> None:
    """The agent finds in its environment what the file holds, to the letter, less the line's end."""
    secret = tmp_path / "secret"
    secret.write_text("a b$c'd\"e`f\\g\n")

    result = run_entrypoint("env", JWT_SECRET_KEY_FILE=str(secret), OTHER_FILE=str(secret))

    variables = dict(line.split("=", 1) for line in result.stdout.splitlines())
    assert variables["JWT_SECRET_KEY"] == "a b$c'd\"e`f\\g"
    assert variables["OTHER_FILE"] == str(secret)
    assert not {"JWT_SECRET_KEY_FILE", "OPENAI_API_KEY"} & variables.keys()


def test_entrypoint_becomes_the_command() -> None:
    """The command takes the entrypoint's place, with its arguments as they were and its own exit status."""
    result = run_entrypoint("sh", "-c", 'printf "%s|" "$@"; exit 7', "sh", "a b", "", "$HOME")

    assert (result.returncode, result.stdout) == (7, "a b||$HOME|")


def test_entrypoint_refuses_to_start_without_its_secret(tmp_path: Path) -> None:
    """A secret that cannot be read stops the start; the agent never runs without it."""
    result = run_entrypoint("echo", "started", JWT_SECRET_KEY_FILE=str(tmp_path / "absent"))

    assert result.returncode != 0
    assert result.stdout == ""
