"""The FastAPI application: what of FastAPI's own is used, described by the operations table.

Holds no room of the house; `app` puts them behind it.
"""

import inspect
from collections.abc import Coroutine
from typing import Any, override

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse

from proxy import docspage, openapi
from proxy.model import Receive, Scope, Send


class Proxy(FastAPI):
    """The FastAPI application, described by the operations table.

    Goes straight to its middleware: FastAPI's own telemetry would ask the environment on every request, and
    send what it finds wherever that says.
    """

    @override
    @inspect.markcoroutinefunction  # servers look whether it is one; a coroutine of its own would only await another
    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Coroutine[Any, Any, None]:
        assert self.middleware_stack is not None  # noqa: S101  create_app sets it
        scope["app"] = self
        return self.middleware_stack(scope, receive, send)  # type: ignore[return-value]  # it may be awaited

    @override
    def openapi(self) -> dict[str, Any]:
        """Give the OpenAPI document (FastAPI serves it)."""
        return openapi.describe()


async def show_page(_: Request) -> HTMLResponse:
    """Answer with the page of the API."""
    return HTMLResponse(docspage.page(openapi.describe()), headers={"Content-Security-Policy": docspage.POLICY})
