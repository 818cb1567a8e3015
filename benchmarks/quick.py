"""`make bench-quick`: is the working tree cheaper or dearer than a commit? Within two minutes, in turns.

Measures ours alone, both sides with one interpreter; prints ratios, below 1 is better.
"""

import argparse
import gc
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from benchmarks.arena import Ground, stand, stand_stub
from benchmarks.contenders.model import ROOT, AbsentError, Contender, Launch, Place
from benchmarks.contenders.ours import environment
from benchmarks.figures import FIGURES, Spread
from benchmarks.instructions import can_count
from benchmarks.measure import QUICK, measure_direct, measure_events, measure_invokes, measure_refusals
from benchmarks.processes import choose_cores, raise_file_limit
from benchmarks.tokens import forged_tokens

SERVE = "import sys; from proxy.cli import main; sys.exit(main())"
BUDGET = 105.0  # seconds; a pair of measurements begins only if it can end within it
LEAST_PAIRS = 2
SHOWN = (
    *("invoke_cpu_us", "invoke_cpu_us_1", "invoke_instructions_k", "event_cpu_us", "event_instructions_k"),
    *("burst_cpu_us", "burst_instructions_k", "first_byte_us", "refuse_401_cpu_us", "refuse_401_instructions_k"),
)


def side(key: str, tree: Path, python: Path) -> Contender:
    """Make a contender of the proxy whose source is in `tree`."""

    def prepare(place: Place) -> Launch:
        # The directory comes first on the path, before what is installed into the interpreter's environment.
        settings = environment(place) | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
        command = (str(python), "-c", SERVE, "serve")
        return Launch(key, (command,), settings, invoke="/agent/invoke", stream="/agent/stream")

    return Contender(key, key, "", prepare, ours=True)


@contextmanager
def check_out(commit: str) -> Iterator[Path]:
    """Give a temporary work tree of `commit`, removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        tree = Path(name) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), commit], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def judge(spread: Spread) -> str:
    """Say what a spread of ratios shows."""
    if spread.least > 1:
        return "dearer"
    return "cheaper" if spread.most < 1 else "no difference shown"


def write_ratios(old: list[dict[str, float]], new: list[dict[str, float]]) -> str:
    """Write one line per figure: old, new, ratio with its spread over the pairs, and what that shows."""
    lines = [f"{'':<30} {'then':>9} {'now':>9}  ratio (least to most), {len(new)} pairs"]
    for figure in FIGURES:
        pairs = [
            (was[figure.key], now[figure.key])
            for was, now in zip(old, new, strict=True)
            if was.get(figure.key) and now.get(figure.key)
        ]
        ratio = Spread.of(now / was for was, now in pairs)
        then, here = Spread.of(was for was, _ in pairs), Spread.of(now for _, now in pairs)
        if figure.key not in SHOWN or ratio is None or then is None or here is None:
            continue
        lines.append(
            f"{figure.title:<30} {then.median:>9,.1f} {here.median:>9,.1f}  "
            f"{ratio.median:.3f} ({ratio.least:.3f} to {ratio.most:.3f})  {judge(ratio)}"
        )
    return "\n".join(lines)


def main() -> int:
    """Compare; 0 unless one side does not start."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quick", description=__doc__)
    parser.add_argument("commit", nargs="?", default="HEAD", help="what to compare the working tree with")
    parser.add_argument("--python", type=Path, default=ROOT / ".venv" / "bin" / "python")
    parser.add_argument("--seconds", type=float, default=BUDGET)
    asked = parser.parse_args()
    raise_file_limit()
    gc.disable()
    plan = replace(QUICK, counts_instructions=can_count())
    near, far = choose_cores()
    began = time.monotonic()
    taken: dict[str, list[dict[str, float]]] = {"then": [], "now": []}
    with check_out(asked.commit) as tree, tempfile.TemporaryDirectory(prefix="bench-") as name:
        sides = [side("then", tree, asked.python), side("now", ROOT, asked.python)]
        with stand_stub(Path(name), near) as stub:
            ground = Ground(stub, asked.python, far)
            direct = measure_direct(stub, plan)
            longest = 0.0
            while len(taken["now"]) < LEAST_PAIRS or time.monotonic() - began + longest < asked.seconds:
                start = time.monotonic()
                for each in sides:
                    try:
                        with stand(each, ground) as standing:
                            values = measure_invokes(standing, direct, plan) | measure_events(standing, direct, plan)
                            values |= measure_refusals(standing, plan, forged_tokens(), 401)
                            taken[each.key].append(values)
                    except AbsentError as error:
                        print(f"{each.key}: {error}", file=sys.stderr)
                        return 1
                sides.reverse()  # whoever went second now goes first
                longest = max(longest, time.monotonic() - start)
                gc.collect()
    print(write_ratios(taken["then"], taken["now"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
