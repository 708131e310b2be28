"""Every route of a vLLM server wants the token. vLLM's own check leaves out those that change weights.

Named by --middleware: loaded in the server's process.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

# What is asked before anybody can know whether the server is one of ours.
OPEN = ("/health", "/version")


class Guard(AuthenticationMiddleware):
    """Answers 401 to whoever does not bring VLLM_API_KEY as a bearer token, on all routes but OPEN."""

    def __init__(self, app: Any) -> None:
        super().__init__(app, [os.environ["VLLM_API_KEY"]])

    def __call__(self, scope: Any, receive: Any, send: Any) -> Awaitable[None]:
        if scope["type"] == "lifespan" or scope.get("path") in OPEN or self.verify_token(Headers(scope=scope)):
            return self.app(scope, receive, send)
        return JSONResponse(content={"error": "Unauthorized"}, status_code=401)(scope, receive, send)
