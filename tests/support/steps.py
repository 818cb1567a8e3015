"""How much work a call is, counted rather than timed: the same on every machine."""

import sys
from collections.abc import Callable


def steps[**P](function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> int:
    """Call it, and count the functions that are called in it, those written in C too."""
    count = 0

    def count_one(_: object, event: str, __: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(count_one)
    try:
        function(*args, **kwargs)
    finally:
        sys.setprofile(None)
    return count
