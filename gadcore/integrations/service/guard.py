"""What stands before the routes: who may ask, and how large and how slow a request may be."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Iterable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gadcore.integrations.service.refused import Refused

# Without a token: they say nothing that whoever can reach the port may not know.
OPEN = ("/healthz", "/docs", "/openapi.json")
_LOCAL = ("localhost", "127.0.0.1", "[::1]", "::1")


class Guard:
    """An ASGI application around another one, which gets whole bodies of requests that may be made.

    A body is read here, up to its limit and within its time: a client that hangs holds a connection, nothing else.
    """

    def __init__(
        self, app: ASGIApp, *, token: str | None, most_bytes: int, body_seconds: float, only_local: bool
    ) -> None:
        """only_local: the names by which this machine calls itself are the only ones: a page of the web that a browser
        has open here could reach the port under another."""
        self._app, self._token, self._most = app, token, most_bytes
        self._body_seconds, self._only_local = body_seconds, only_local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value for name, value in scope["headers"]}
        try:
            self._check(scope, headers)
            body = await self._body(receive, headers)
        except Refused as refused:
            await respond(send, refused)
            return
        if body is None:
            return
        sent = False

        async def replay() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)

    def _check(self, scope: Scope, headers: dict[str, bytes]) -> None:
        host = headers.get("host", b"").decode("latin-1")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if self._only_local and name not in _LOCAL:
            raise Refused(403, "host", f"the service is this machine's own, not {host[:80]!r}: ask for 127.0.0.1")
        if self._token is not None and scope["path"] not in OPEN:
            given = headers.get("authorization", b"")
            if not hmac.compare_digest(given, f"Bearer {self._token}".encode()):
                what = "the token is wrong" if given else "there is no token"
                raise Refused(401, "token", f"{what}: send the header Authorization: Bearer TOKEN")
        if scope["method"] == "POST":
            kind = headers.get("content-type", b"").split(b";")[0].strip().lower()
            if kind != b"application/json":
                raise Refused(415, "content_type", "the body must be JSON: send Content-Type: application/json")

    async def _body(self, receive: Receive, headers: dict[str, bytes]) -> bytes | None:
        """The whole body; None where the client has gone."""
        length = headers.get("content-length", b"0")
        if length.isdigit() and int(length) > self._most:
            raise self._too_large()
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    part = message.get("body", b"")
                    size += len(part)
                    if size > self._most:
                        raise self._too_large()
                    parts.append(part)
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            told = f"the body did not arrive in {self._body_seconds:g} s (service.body_seconds): send it again"
            raise Refused(408, "slow", told) from None

    def _too_large(self) -> Refused:
        limit = f"{self._most / 2**20:g} MiB (service.most_body_mib)"
        return Refused(413, "too_large", f"the body is larger than {limit}: send fewer groups at a time")


async def respond(send: Send, refused: Refused) -> None:
    """Sends what was refused."""
    body = json.dumps(error_body(refused.code, refused.message)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in headers_of(refused)]
    if refused.status in (408, 413):
        # What is still to come of the body is nobody's to read.
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def headers_of(refused: Refused) -> Iterable[tuple[str, str]]:
    if refused.retry_after is not None:
        yield "Retry-After", str(refused.retry_after)
    if refused.status == 401:
        yield "WWW-Authenticate", "Bearer"


def error_body(code: str, message: str) -> dict[str, Any]:
    return {"error": {"code": code, "message": message}}
