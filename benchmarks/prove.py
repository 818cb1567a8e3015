"""Proves that the contenders do the job they are compared at: each refuses bad tokens and counts per caller.

Starts each once with a small limit; measures nothing.
"""

import asyncio
import sys
import tempfile
from pathlib import Path

from benchmarks.arena import Ground, Standing, refuses, stand, stand_stub
from benchmarks.contenders import CHECKS_NOTHING, CONTENDERS
from benchmarks.contenders.model import ROOT, AbsentError, Contender
from benchmarks.load import drive_invokes
from benchmarks.processes import choose_cores
from benchmarks.tokens import bad_tokens, make_tokens

LIMIT = 30


def _count(standing: Standing, token: str, attempts: int, status: int) -> int:
    """Give how many of `attempts` invokes by one caller were answered with `status`."""
    load = drive_invokes(
        standing.port, standing.invokes([token]), in_flight=1, seconds=30, most=attempts, expected=status
    )
    result = asyncio.run(load)
    return result.answered - result.errors


def prove(contender: Contender, ground: Ground) -> str:
    """Give a sentence on what the contender does, beginning with `ok` when it is all that it should."""
    faults = []
    with stand(contender, ground, per_minute=LIMIT) as standing:
        if not refuses(standing, bad_tokens()):
            faults.append("lets a bad token through")
        tokens = make_tokens()
        refused = _count(standing, tokens[1], 3 * LIMIT, 429)
        if not LIMIT <= refused <= 2 * LIMIT + 1:
            faults.append(f"refuses {refused} of {3 * LIMIT} requests at a limit of {LIMIT}")
        if _count(standing, tokens[2], 5, 200) != 5:
            faults.append("counts callers together")
    return "; ".join(faults) or "ok"


def main() -> int:
    """Prove every contender that claims to check anything; 1 when one does not."""
    near, far = choose_cores()
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="bench-") as name, stand_stub(Path(name), near) as stub:
        ground = Ground(stub, ROOT / ".venv" / "bin" / "agentflow-proxy", far)
        for contender in CONTENDERS:
            if contender.key in CHECKS_NOTHING or (len(sys.argv) > 1 and contender.key not in sys.argv[1:]):
                continue
            try:
                said = prove(contender, ground)
                wrong += said != "ok"
            except AbsentError as error:
                said = f"absent: {error}"
            print(f"{contender.title}: {said}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
