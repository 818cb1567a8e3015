"""A caller's own threads, out of whatever the sidecar lists: filtered by tag, then searched and paged here.

Pure. The sidecar's checkpointers differ in whose threads they list, so nothing it lists is trusted.
"""

from dataclasses import dataclass, field
from typing import Any, Final

import pydantic_core

from proxy.errors import ClientProblem
from proxy.outages import UpstreamMalformed
from proxy.tenancy import SEPARATOR, is_finite

UPSTREAM_PAGE: Final = 1000
"""The most that the sidecar gives at once."""
MOST_PAGES: Final = 20
_DEFAULT_LIMIT: Final = 100


@dataclass(frozen=True, slots=True)
class Page:
    """What the caller asked for; `search` is matched against every value of a thread, without case."""

    search: str
    offset: int
    limit: int


@dataclass(slots=True)
class Gathering:
    """The caller's threads as they are found, and what to ask the sidecar next.

    A checkpointer that keeps callers apart lists the caller's own; one that does not lists everybody's, but
    finds ids by a search, which Postgres does not. So everything is asked for first, and the tag is searched
    for only when others' threads fill the page.
    """

    tag: str
    answer: dict[str, Any] = field(default_factory=dict)
    _found: dict[str, dict[str, Any]] = field(default_factory=dict)
    _asked: int = 0
    _searching: bool = False
    _offset: int = 0
    _done: bool = False
    _missed: bool = False

    def next_window(self) -> dict[str, str | int] | None:
        """Give the query of the next page to ask for; None when there is no more to find."""
        if self._done or self._asked == MOST_PAGES:
            return None
        self._asked += 1
        window: dict[str, str | int] = {"offset": self._offset, "limit": UPSTREAM_PAGE}
        return window | {"search": self.tag} if self._searching else window

    def take(self, body: bytes) -> None:
        """Read the page that was asked for. Raises UpstreamMalformed."""
        self.answer, listed = threads_of(body)
        mine = own(listed, self.tag)
        self._found |= {str(thread["thread_id"]): thread for thread in mine}
        self._offset += UPSTREAM_PAGE
        if len(listed) < UPSTREAM_PAGE:
            # A search that finds nothing on a full table was made where ids are not searched.
            fruitless = self._searching and not mine and self._offset == UPSTREAM_PAGE
            self._searching, self._missed, self._done = False, fruitless, not fruitless
        elif not self._searching and not self._missed and len(mine) < len(listed):
            self._searching, self._offset = True, 0

    def threads(self) -> list[dict[str, Any]]:
        """Give what was found, the latest changed first."""
        return sorted(self._found.values(), key=lambda thread: str(thread.get("updated_at") or ""), reverse=True)


def page_of(query: dict[str, str]) -> Page:
    """Read a page from query parameters. Raises ClientProblem for what is no count."""
    return Page(
        search=query.get("search", "").lower(),
        offset=_count(query, "offset", 0, least=0),
        limit=min(_count(query, "limit", _DEFAULT_LIMIT, least=1), UPSTREAM_PAGE),
    )


def _count(query: dict[str, str], name: str, default: int, *, least: int) -> int:
    text = query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and int(text) >= least):  # noqa: PLR2004  digits
        raise ClientProblem(f"{name} must be a whole number of at least {least}.")
    return int(text)


def threads_of(answer: bytes) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read the sidecar's listing: the whole answer, and the threads in it. Raises UpstreamMalformed."""
    try:
        value = pydantic_core.from_json(answer, allow_inf_nan=False)
        threads = value["data"]["threads"]
        if not is_finite(value):
            raise UpstreamMalformed(reason="a number that JSON cannot carry")
        if not all(isinstance(thread["thread_id"], str | int) for thread in threads):
            raise UpstreamMalformed(reason="a thread without an id")
    except (ValueError, TypeError, KeyError) as error:
        raise UpstreamMalformed(reason="not a listing") from error
    return value, threads


def own(threads: list[dict[str, Any]], tag: str) -> list[dict[str, Any]]:
    """Keep the threads whose ids carry `tag`."""
    prefix = tag + SEPARATOR
    return [thread for thread in threads if str(thread["thread_id"]).startswith(prefix)]


def select(threads: list[dict[str, Any]], page: Page) -> list[dict[str, Any]]:
    """Give the page of those threads that match its search."""
    if page.search:
        threads = [t for t in threads if any(page.search in str(value).lower() for value in t.values())]
    return threads[page.offset : page.offset + page.limit]


def encode_listing(answer: dict[str, Any], threads: list[dict[str, Any]]) -> bytes:
    """Write the sidecar's answer with `threads` in the place of its own."""
    return pydantic_core.to_json(answer | {"data": answer["data"] | {"threads": threads}})
