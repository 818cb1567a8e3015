"""The house as its plan says: rooms, sizes, the life of a request, and what may be imported where."""

import ast
import re
from pathlib import Path

import pytest

import proxy

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "proxy").glob("*.py"))
FORBIDDEN_NAMES = re.compile(r"(utils?|helpers?|common|manager|base)\b|^(handle|process|do)_")


def tree_of(path: Path) -> ast.Module:
    """Read a module's syntax."""
    return ast.parse(path.read_text())


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_a_room_says_what_it_is_for_and_stays_small(path: Path) -> None:
    """Each module opens with a docstring and has at most 300 lines."""
    text = path.read_text()

    assert ast.get_docstring(ast.parse(text))
    assert len(text.splitlines()) <= 300


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_names_say_what_things_do(path: Path) -> None:
    """No drawer for whatever fits nowhere else."""
    named = [node.name for node in ast.walk(tree_of(path)) if isinstance(node, ast.FunctionDef | ast.ClassDef)]

    assert not [name for name in [path.stem, *named] if FORBIDDEN_NAMES.search(name)]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_nothing_happens_at_import(path: Path) -> None:
    """A module defines; the only calls at its top level make constants, and `__main__` runs the command."""
    harmless = {
        "re.compile",
        "bytes",
        "json.JSONDecoder",
        "range",
        "ord",
        "frozenset",
        "logging.getLogger",
        "object",
        "Operation",
        "Family",
        "Path",
        "Path(__file__).resolve",
    }
    harmless |= {"sql.Table", "sql.Column", "sql.MetaData", "sql.String"}
    calls = [
        ast.unparse(call.func)
        for node in tree_of(path).body
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.Expr)
        for call in ast.walk(node)
        if isinstance(call, ast.Call)
    ]

    assert path.stem == "__main__" or set(calls) <= harmless


def test_the_life_of_a_request_names_every_room_once_it_exists() -> None:
    """The docstring of the package and the folder agree on which modules there are."""
    told = set(re.findall(r"`([a-z_]+)`", proxy.__doc__ or ""))

    assert told == {path.stem for path in MODULES} - {"__init__", "__main__"}


def test_the_life_of_a_request_is_the_order_in_the_code() -> None:
    """Observability is outermost, then authentication, then the routes; an endpoint authorizes before it charges."""
    app = (ROOT / "proxy" / "app.py").read_text()
    routes = (ROOT / "proxy" / "routes.py").read_text()
    endpoint = routes[routes.index("class Endpoint") :]
    run = routes[routes.index("async def run") : routes.index("async def control")]

    assert app.index("CanonicalPaths(") < app.index("Authentication(") < app.index("Observability(")
    assert endpoint.index("authorize(") < endpoint.index(".require_room(") < endpoint.index(".admit(")
    assert endpoint.index(".admit(") < endpoint.index("self._perform(")
    assert run.index("self._read(") < run.index("bind_run(") < run.index("self._upstream(") < run.index(".relay(")


def test_no_file_names_a_package_host_or_this_machine() -> None:
    """What is committed can be built anywhere."""
    host = re.compile(r"(pypi|pythonhosted|npmjs)\.(org|com)")
    files = [*ROOT.glob("requirements/*.txt"), ROOT / "pyproject.toml", ROOT / "Makefile", *ROOT.glob("deploy/*")]

    assert not [path.name for path in files if path.is_file() and host.search(path.read_text())]


def test_requirements_are_pinned_with_hashes() -> None:
    """Every pinned requirement has at least one hash."""
    for path in ROOT.glob("requirements/*.txt"):
        text = path.read_text()
        pinned = re.findall(r"^[a-z0-9].*==", text, re.MULTILINE)

        assert pinned
        assert len(re.findall(r"--hash=sha256:", text)) >= len(pinned)
