"""The tools a model may call: deterministic, and free of side effects.

They never read a clock, a file or the network; a name without a function here cannot be called.
"""

from collections.abc import Callable


def add(a: int, b: int) -> int:
    """Add two whole numbers."""
    return a + b


def word_count(text: str) -> int:
    """Count the words of a text."""
    return len(text.split())


TOOLS: tuple[Callable[..., int], ...] = (add, word_count)
