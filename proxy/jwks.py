"""Key sets fetched from an issuer: bounded, cached, refreshed before they expire and when a key is unknown.

Never follows a redirect, and never lets a provider that is down, slow or wrong take away keys that were good.
"""

import asyncio
import json
import logging
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

import httpx

from proxy.issuers import Issuer, fetchable
from proxy.outages import KeysUnavailable
from proxy.publickeys import VerificationKey, candidates, set_keys

log: Final = logging.getLogger("agentflow_proxy.tokens")
MAX_DOCUMENT_BYTES: Final = 256 << 10
_MAX_AGE: Final = re.compile(r"(?:^|[\s,])max-age=([0-9]{1,9})(?:$|[\s,])", re.ASCII)
_AHEAD: Final = 0.8
"""The share of a set's life after which it is fetched again, while it still counts."""


@dataclass(frozen=True, slots=True)
class FetchRules:
    """Seconds: a fetch's deadline, the pause between two, the longest that a set is fresh, that it counts."""

    timeout: float = 3
    cooldown: float = 10
    fresh: float = 600
    stale: float = 86_400


@dataclass(frozen=True, slots=True)
class Document:
    """A fetched JSON object and the seconds that its server lets it be kept, if it says so."""

    content: dict[str, Any]
    max_age: float | None


class DocumentError(Exception):
    """What came is not what was asked for; says why, without its content."""


type Fetch = Callable[[str], Awaitable[Document]]


class Fetcher:
    """Gets JSON documents with httpx: one deadline for all of it, no redirect, no coding, no proxy, no cookie."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._trust = httpx.create_ssl_context(trust_env=False)

    async def __call__(self, url: str) -> Document:
        """Fetch `url`. Raises DocumentError."""
        try:
            async with asyncio.timeout(self._timeout):
                return await self._get(url)
        except TimeoutError as error:
            raise DocumentError("deadline") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise DocumentError(type(error).__name__) from error

    async def _get(self, url: str) -> Document:
        headers = {"accept": "application/json", "accept-encoding": "identity"}
        body = bytearray()
        async with (
            httpx.AsyncClient(verify=self._trust, trust_env=False, timeout=self._timeout) as client,
            client.stream("GET", url, headers=headers, follow_redirects=False) as answer,
        ):
            if answer.status_code != httpx.codes.OK:
                raise DocumentError(f"status {answer.status_code}")
            async for part in answer.aiter_raw():
                body += part
                if len(body) > MAX_DOCUMENT_BYTES:
                    raise DocumentError(f"more than {MAX_DOCUMENT_BYTES} bytes")
            age = _MAX_AGE.search(answer.headers.get("cache-control", ""))
        try:
            content = json.loads(body.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise DocumentError("not JSON") from error
        if not isinstance(content, dict):
            raise DocumentError("not a JSON object")
        return Document(content, float(age[1]) if age is not None else None)


class RemoteKeys:
    """One issuer's keys, fetched by one task at a time, however many requests wait for them.

    Times come from `clock` (monotonic, seconds).
    """

    def __init__(
        self,
        issuer: Issuer,
        fetch: Fetch,
        *,
        rules: FetchRules | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._issuer = issuer
        self._fetch = fetch
        self._rules = rules or FetchRules()
        self._clock = clock
        self._keys: tuple[VerificationKey, ...] = ()
        self._fetched = self._tried = float("-inf")
        self._fresh = self._rules.fresh
        self._failing = False
        self._task: asyncio.Task[None] | None = None

    async def find(self, key_id: str | None, algorithm: str) -> tuple[VerificationKey, ...]:
        """Give the keys for a token's header.

        Waits only for a first set, an outdated one, or an unknown key; and not for a provider that failed the
        last time, while its last set counts.

        Raises KeysUnavailable when there has been no good set, or none for `FetchRules.stale` seconds.
        """
        age = self._clock() - self._fetched
        if age >= self._fresh and not (self._failing and age < self._rules.stale):
            await self._refresh()
        elif age >= self._fresh * _AHEAD:
            self._start()
        found = self._candidates(key_id, algorithm)
        if not found and key_id is not None and age < self._fresh:
            await self._refresh()
            found = self._candidates(key_id, algorithm)
        return found

    @property
    def lasting(self) -> float:
        return self._fresh

    def _candidates(self, key_id: str | None, algorithm: str) -> tuple[VerificationKey, ...]:
        if self._clock() - self._fetched >= self._rules.stale:
            raise KeysUnavailable
        return candidates(self._keys, key_id, algorithm)

    async def _refresh(self) -> None:
        """Wait for a fetch, unless the last one is too recent; whoever leaves does not take it from the others."""
        task = self._start()
        if task is not None:
            await asyncio.shield(task)

    def _start(self) -> asyncio.Task[None] | None:
        if self._task is None and self._clock() - self._tried >= self._rules.cooldown:
            self._tried = self._clock()
            self._task = asyncio.create_task(self._replace())
            self._task.add_done_callback(self._forget)
        return self._task

    def _forget(self, _: asyncio.Task[None]) -> None:
        self._task = None

    async def _replace(self) -> None:
        """Fetch a set and put it in the place of the last, if it is any good."""
        name = self._issuer.rules.issuer
        try:
            document, keys = await self._read()
        except (DocumentError, ValueError) as error:
            self._failing = True
            fields = {"issuer": name, "reason": str(error), "kept": len(self._keys)}
            log.warning("keys.fetch_failed", extra={"fields": fields})
            return
        self._keys, self._fetched, self._failing = keys, self._clock(), False
        asked = self._rules.fresh if document.max_age is None else document.max_age
        self._fresh = min(max(asked, self._rules.cooldown), self._rules.fresh)
        log.info("keys.fetched", extra={"fields": {"issuer": name, "keys": len(keys)}})

    async def fetch(self) -> tuple[VerificationKey, ...]:
        """Fetch the keys once, to see whether that can be done. Raises DocumentError or ValueError."""
        return (await self._read())[1]

    async def _read(self) -> tuple[Document, tuple[VerificationKey, ...]]:
        document = await self._fetch(await self._key_set_url())
        return document, set_keys(document.content, self._issuer.algorithms)

    async def _key_set_url(self) -> str:
        """Give where the key set is: as configured, or as the provider describes itself (OpenID Discovery §4.3)."""
        url = self._issuer.url or ""
        if not self._issuer.discovers:
            return url
        description = (await self._fetch(url)).content
        if description.get("issuer") != self._issuer.rules.issuer:
            raise DocumentError("the description is another issuer's")
        found = description.get("jwks_uri")
        if not isinstance(found, str):
            raise DocumentError("no jwks_uri")
        # What came from afar may not point at this machine, which is all that http is for.
        if url.lower().startswith("https:") and not found.lower().startswith("https:"):
            raise DocumentError("jwks_uri is not https")
        return fetchable(found)
