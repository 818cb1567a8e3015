"""What a prompt tells the local model to do, as a value: directives such as `[pace 20ms]` in the text.

It never fails and never grows without bound: a malformed directive, or one that asks for too much, is text.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from types import MappingProxyType

MOST_WORDS = 100_000
MOST_SECONDS = 600.0
MOST_BYTES = 64 * 1024 * 1024
PIECE = 4096
"""Bytes in each delta of an answer that was asked for by size."""

DIRECTIVE = re.compile(r"\[(pace|wait|words|bytes|fail|tool|recall)((?: [^\[\]]*)?)\]")
DURATION = re.compile(r"(\d{1,7})(ms|s)", re.ASCII)
COUNT = re.compile(r"\d{1,9}", re.ASCII)
WHOLE = re.compile(r"-?\d{1,15}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Echo:
    """Repeats what was said, word by word."""

    text: str


@dataclass(frozen=True, slots=True)
class Words:
    """Says `w1 w2 …`, a word a delta."""

    count: int


@dataclass(frozen=True, slots=True)
class Bytes:
    """Says exactly so many bytes."""

    count: int


@dataclass(frozen=True, slots=True)
class Recall:
    """Says what this thread's user said before."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """Has a tool called, then says its result."""

    name: str
    arguments: Mapping[str, int | str]


@dataclass(frozen=True, slots=True)
class Failure:
    """Breaks the answer off after so many deltas."""

    after: int
    message: str = "The local model failed, as it was told to."


type Answer = Echo | Words | Bytes | Recall | ToolCall


@dataclass(frozen=True, slots=True)
class Script:
    """One answer and how it comes: `wait` before the first delta and `pace` between them, in seconds."""

    answer: Answer
    wait: float = 0.0
    pace: float = 0.0
    failure: Failure | None = None


def parse_script(text: str) -> Script:
    """Read the script in a user's text. The first well-formed directive of each kind counts."""
    answer: Answer | None = None
    wait = pace = None
    failure: Failure | None = None
    plain: list[str] = []
    end = 0
    for match in DIRECTIVE.finditer(text):
        name, rest = match[1], match[2].strip()
        seconds = _duration(rest) if name in {"wait", "pace"} else None
        told = _answer(name, rest)
        failing = _failure(rest) if name == "fail" else None
        if seconds is None and told is None and failing is None:
            continue
        plain.append(text[end : match.start()])
        end = match.end()
        answer = answer or told
        failure = failure or failing
        if name == "wait" and wait is None:
            wait = seconds
        if name == "pace" and pace is None:
            pace = seconds
    plain.append(text[end:])
    if answer is None:
        # So that `[fail 5]` alone has five deltas to fail after.
        answer = Words(failure.after) if failure else Echo("".join(plain).strip())
    return Script(answer, wait=wait or 0.0, pace=pace or 0.0, failure=failure)


def deltas(answer: Answer, *, said: Sequence[str], result: str) -> Iterator[str]:
    """Cut the answer's text into the pieces it is streamed in.

    `said` is what the thread's user said before; `result` is what a called tool returned.
    """
    match answer:
        case Echo(text):
            return iter(re.findall(r"\S+\s*", f"You said: {text}"))
        case Words(count):
            return (f"w{number} " for number in range(1, count + 1))
        case Bytes(count):
            whole, left = divmod(count, PIECE)
            return chain(repeat("x" * PIECE, whole), ["x" * left] if left else [])
        case Recall():
            return iter("\n".join(said).splitlines(keepends=True) or ["Nothing was said before."])
        case ToolCall(name):
            return iter(re.findall(r"\S+\s*", f"The tool {name} answered: {result}"))


def _answer(name: str, rest: str) -> Answer | None:
    match name:
        case "words":
            count = _count(rest, MOST_WORDS)
            return None if count is None else Words(count)
        case "bytes":
            count = _count(rest, MOST_BYTES)
            return None if count is None else Bytes(count)
        case "recall" if not rest:
            return Recall()
        case "tool":
            return _tool_call(rest)
    return None


def _tool_call(rest: str) -> ToolCall | None:
    name, _, arguments = rest.partition(" ")
    match name, arguments.split():
        case "add", [a, b] if WHOLE.fullmatch(a) and WHOLE.fullmatch(b):
            return ToolCall(name, MappingProxyType({"a": int(a), "b": int(b)}))
        case "word_count", [_, *_]:
            return ToolCall(name, MappingProxyType({"text": arguments.strip()}))
    return None


def _failure(rest: str) -> Failure | None:
    first, _, message = rest.partition(" ")
    after = _count(first, MOST_WORDS)
    if after is None:
        return None
    return Failure(after, message.strip()) if message.strip() else Failure(after)


def _count(text: str, most: int) -> int | None:
    return int(text) if COUNT.fullmatch(text) and int(text) <= most else None


def _duration(text: str) -> float | None:
    found = DURATION.fullmatch(text)
    if found is None:
        return None
    seconds = int(found[1]) / (1000 if found[2] == "ms" else 1)
    return seconds if seconds <= MOST_SECONDS else None
