"""Files belong to callers by their handles: `<seal>~<id>`, which only the proxy can make, for one caller.

Pure. The sidecar's own file id opens nothing here; without the right seal a file does not exist (docs/adr/0017).
"""

import base64
import hmac
import re
from typing import Any, Final

import pydantic_core

from proxy.errors import BodyInvalid, NotFound
from proxy.outages import UpstreamMalformed

SEPARATOR: Final = "~"
INTERNAL_SCHEME: Final = "agentflow:"
"""How a message's URL begins that means a stored file; AgentFlow reads it in lower case only."""
INTERNAL_URL: Final = "agentflow://media/"
_FILES: Final = "/v1/files/"
_FILE_ID: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,127}", re.ASCII)
_TALK: Final = frozenset({"text", "content"})
"""Where a text is what somebody said, which names nothing."""


class Handles:
    """Makes and opens the handles of one caller: the one with `tag`. Without a `secret` there are none."""

    def __init__(self, tag: str, secret: bytes | None) -> None:
        self._tag = tag
        self._secret = secret

    def seal(self, file_id: str) -> str:
        """Give the handle of a file that the caller owns. Raises UpstreamMalformed for what is no file id."""
        if self._secret is None or _FILE_ID.fullmatch(file_id) is None:
            raise UpstreamMalformed(reason="not a file id")
        return f"{self._mark(file_id, self._secret)}{SEPARATOR}{file_id}"

    def open(self, handle: object) -> str:
        """Give the sidecar's id for a handle. Raises NotFound for whatever is no handle of this caller's."""
        seal, separator, file_id = handle.partition(SEPARATOR) if isinstance(handle, str) else ("", "", "")
        if self._secret is None or not separator or _FILE_ID.fullmatch(file_id) is None:
            raise NotFound("No such file.")
        if not hmac.compare_digest(seal.encode("utf-8", "replace"), self._mark(file_id, self._secret).encode()):
            raise NotFound("No such file.")
        return file_id

    def _mark(self, file_id: str, secret: bytes) -> str:
        """80 bits of HMAC-SHA256 (RFC 2104) over caller and file, in base32."""
        digest = hmac.digest(secret, f"{self._tag}{SEPARATOR}{file_id}".encode(), "sha256")
        return base64.b32encode(digest[:10]).decode("ascii").lower()


def may_name_files(raw: bytes) -> bool:
    """Say whether a JSON text could name a file. A letter can be written by its number, so one that is counts too."""
    escapes = b"\\" in raw and b"\\u" in raw  # one letter is found at once
    return escapes or b"file_id" in raw or b"agentflow:" in raw


def open_handles(value: object, handles: Handles) -> None:
    """Put the sidecar's ids in the place of the handles anywhere in a decoded message, in AgentFlow's form.

    Raises NotFound for a file that is not the caller's, the sidecar's own ids included, and BodyInvalid for
    what is no file id at all.
    """
    if isinstance(value, list):
        for position, each in enumerate(value):
            if isinstance(each, str):
                value[position] = _opened_url(each, handles)
            else:
                open_handles(each, handles)
    elif isinstance(value, dict):
        for name, each in value.items():
            if name == "file_id":
                value[name] = _opened_id(each, handles)
            elif not isinstance(each, str):
                open_handles(each, handles)
            elif name not in _TALK:
                value[name] = _opened_url(each, handles)


def open_part_handles(value: object, handles: Handles) -> None:
    """Do the same for the parts of AG-UI's messages, which name a file by a source, or as a legacy `binary` part."""
    if isinstance(value, list):
        for each in value:
            open_part_handles(each, handles)
    elif isinstance(value, dict):
        if value.get("type") == "binary" and value.get("id"):
            value["id"] = handles.open(value["id"])
        source = value.get("source")
        if isinstance(source, dict) and source.get("type") == "file":
            source["value"] = handles.open(source.get("value"))
        elif isinstance(source, dict) and source.get("type") not in ("data", "url"):
            raise BodyInvalid("source.type must be data, url or file.")
        for each in value.values():
            open_part_handles(each, handles)


def sealed_answer(answer: bytes, handles: Handles) -> bytes:
    """Write the sidecar's answer about one file with its handle instead of its id. Raises UpstreamMalformed.

    `data.file_id` and a relative `data.url` change; everything else is as the sidecar says.
    """
    try:
        value: Any = pydantic_core.from_json(answer, allow_inf_nan=False)
        data = value["data"]
        file_id = data["file_id"]
        if not isinstance(file_id, str):
            raise UpstreamMalformed(reason="a file without an id")
        handle = handles.seal(file_id)
        if data.get("url") == _FILES + file_id:
            data["url"] = _FILES + handle
        data["file_id"] = handle
        return pydantic_core.to_json(value)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UpstreamMalformed(reason="not about a file") from error


def _opened_id(value: object, handles: Handles) -> object:
    if value is None or value == "":
        return value
    if not isinstance(value, str):
        raise BodyInvalid("file_id must be text.")
    return handles.open(value)


def _opened_url(text: str, handles: Handles) -> str:
    if not text.startswith(INTERNAL_SCHEME):
        return text
    if not text.startswith(INTERNAL_URL):
        raise NotFound("No such file.")
    return INTERNAL_URL + handles.open(text.removeprefix(INTERNAL_URL))
