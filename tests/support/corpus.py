"""A corpus of streams, ways to cut them up, and what they mean to a client of lines."""

import itertools
import json
import random
from collections.abc import Iterator


def message(text: str) -> bytes:
    """Write a line as the sidecar does."""
    value = {"event": "message", "message": {"content": [{"type": "text", "text": text}], "delta": True}, "data": None}
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


TEXTS = {
    "ascii": "word ",
    "empty": "",
    "umlauts": "grüße",
    "three bytes": "漢字",
    "four bytes": "😀🏳️‍🌈",
    "separators": "a\u2028b\u2029c\u0085d",
    "zero width": "a\ufeffb",
    "escaped newlines": "a\nb\r\nc\rd",
    "escaped nul": "a\0b",
    "looks like an error line": '{"event":"error","data":{}}',
    "a newline and an error line": '\n{"event":"error"}',
    "the word": '"error"',
    "looks like an event": "data: x\n\nevent: error\n\n",
    "a comment": ": ping",
    "long": "x" * 70_000,
}
SHAPES = {
    "LF": lambda line: line + b"\n" + line + b"\n",
    "CRLF": lambda line: line + b"\r\n" + line + b"\r\n",
    "mixed ends": lambda line: line + b"\n" + line + b"\r\n" + line + b"\n",
    "no last newline": lambda line: line + b"\n" + line,
    "empty lines": lambda line: b"\n\n" + line + b"\n\r\n\n" + line + b"\n\n",
    "a BOM": lambda line: b"\xef\xbb\xbf" + line + b"\n" + line + b"\n",
    "CR between tokens": lambda line: line.replace(b'{"event":', b'{\r"event"\r:', 1) + b"\n",
    "blanks": lambda line: b"  " + line + b" \t\n\t" + line + b"\n",
}
ODD = {
    "nothing": b"",
    "one newline": b"\n",
    "only blanks": b" \r\n\t\n",
    "only a BOM": b"\xef\xbb\xbf",
    "half a BOM": b"\xef\xbb",
    "no JSON": b"hello\nworld\n",
    "NUL": b'{"event":"message","x":"\0"}\n',
    "invalid UTF-8": b'{"event":"message","x":"\xff\xfe\x80"}\n',
    "another member first": b'{"x":1,"event":"message"}\n',
    "no event": b'{"x":1}\n',
    "an event that is no text": b'{"event":7}\n{"event":null}\n',
    "a list": b"[1,2]\n",
    "a name with a break": b'{"event":"a\\nb"}\n',
    "a name that is an end": b'{"event":"done"}\n{"event":"stopped"}\n',
    "an object cut off": b'{"event":"message","mess',
    "almost an error": b'{"event":"erro',
    "an errors event": b'{"event":"errors"}\n',
    "a longer name": b'{"event":"error_of_mine"}\n',
    "an escaped name": b'{"event":"\\u0065rror"}\n',
    "an error inside": b'{"event":"updates","data":{"event":"error"}}\n',
    "a megabyte": message("y" * (1 << 20)) + b"\n",
    "a megabyte without an end": message("y" * (1 << 20)),
    "a megabyte of NULs": b"\0" * (1 << 20) + b"\n" + message("z") + b"\n",
    "a thousand lines": (message("z") + b"\n") * 1000,
    "nothing but a NUL": b"\0",
    "NULs around": b"\0\n\0" + message("z") + b"\0\n\0\0",
    "NUL behind a BOM": b"\xef\xbb\xbf\0\n",
    "comment lines between": message("z") + b"\n: ping\n\n:\n" + message("z") + b"\r\n: ping\r\n\r\n",
    "cut off in a character": message("grüße 漢")[:-5],
    "cut off in a long character": message("z") + b"\n" + "😀".encode()[:3],
    "cut off in a CRLF": message("z") + b"\r\n" + message("z") + b"\r",
    "cut off in an escape": b'{"event":"message","x":"a\\u00',
    "cut off behind a backslash": b'{"event":"message","x":"a\\',
    "cut off in its name": message("z") + b'\n{"event":"mess',
    "cut off at once": message("z") + b"\n{",
    "only carriage returns": b'{"event":"a"}\r{"event":"b"}\r',
}
CORPUS = {
    **{f"{text}, {shape}": SHAPES[shape](message(TEXTS[text])) for text, shape in itertools.product(TEXTS, SHAPES)},
    **ODD,
}
OWN = {
    "a comment first": b": ping\n\n" + b"data: " + message("z") + b"\n\n",
    "comments, then a line": b": hi\n" + message("z") + b"\n",
    "an empty comment": b":\n\n:\r\n\r\n: \r\r",
    "data": b"data: " + message("grüße") + b"\n\ndata: x\ndata\n\n",
    "CRLF": b"event: x\r\nid: 1\r\ndata: 1\r\n\r\n: ping\r\n\r\n",
    "CR": b"event: x\r\rdata: 1\r\r",
    "a BOM": b"\xef\xbb\xbfretry: 10\n\n",
    "blanks before": b" \n\r\n\tid: 7\ndata: 1\n\n",
    "NUL in an id": b"id: a\0b\ndata: \0\n\n\0",
    "a megabyte": b"data: " + b"y" * (1 << 20) + b"\n\n",
    "cut off in a field": b"data: 1\n\nda",
    "cut off in a character": "data: é".encode()[:-1],
    "an error of its own": b'event: error\ndata: {"event":"error"}\n\n',
}
"""Server-sent events already."""
PIECES = ["whole", "bytes", "random", "before newlines"]


def cut(stream: bytes, how: str) -> Iterator[bytes]:
    """Cut a stream up; a large one by the byte only at its ends."""
    if how == "whole":
        yield stream
    elif how == "bytes":
        middle = stream[100:-100] if len(stream) > 20_000 else b""
        head, tail = (stream[:100], stream[-100:]) if middle else (stream, b"")
        yield from (head[at : at + 1] for at in range(len(head)))
        if middle:
            yield middle
        yield from (tail[at : at + 1] for at in range(len(tail)))
    elif how == "random":
        choice = random.Random(stream[:50])  # noqa: S311  where to cut is no secret
        at = 0
        while at < len(stream):
            size = choice.choice((1, 2, 3, 7, 64, 1000, 65_536))
            yield stream[at : at + size]
            at += size
    else:
        first, *rest = stream.split(b"\n")
        yield first
        yield from (b"\n" + part for part in rest)


def meant(stream: bytes) -> list[tuple[str, str]]:
    """Read a stream as a client of lines does: the name and the text of each line that is not blank."""
    result = []
    for line in stream.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        text = line.removesuffix(b"\r").decode("utf-8", "replace")
        if text.strip(" \t\r"):
            try:
                value = json.loads(text, strict=False)
                name = value.get("event") if isinstance(value, dict) else None
            except ValueError:
                name = None
            result.append((name if isinstance(name, str) else "message", text.replace("\r", "\n")))
    return result
