"""One POST to an endpoint and the whole body of its answer: paced, and bounded in time and size whatever comes back."""

from __future__ import annotations

import asyncio
import json
import os
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from gadcore.teacher.limits import MinuteLimit
from gadcore.teacher.reply import Unusable
from gadcore.teacher.secret import Secret
from gadcore.teacher.settings import OPENAI, Endpoint

MOST_REDIRECTS = 3
LONGEST_WAIT_S = 60.0
# Who pays at OpenAI, for keys that belong to several organisations.
_OWNER = {"OpenAI-Organization": "OPENAI_ORG_ID", "OpenAI-Project": "OPENAI_PROJECT_ID"}
_INFLATE = 47  # zlib's word for "gzip or zlib, whichever it is"


@dataclass(frozen=True)
class Answer:
    """body: decompressed. wait_s: of the header Retry-After, 0 without one."""

    status: int
    body: bytes
    wait_s: float


class Transport:
    """A context manager. sent: HTTP requests so far, redirects included."""

    def __init__(self, endpoint: Endpoint, secret: Secret) -> None:
        self._url = httpx2.URL(endpoint.base_url.rstrip("/") + "/chat/completions")
        self._secret, self._limit = secret, int(endpoint.max_answer_mib * 2**20)
        self._pace = MinuteLimit(endpoint.requests_per_minute)
        self.sent = 0
        owner = {name: os.environ.get(variable) for name, variable in _OWNER.items() if endpoint.host == OPENAI}
        self._client = httpx2.AsyncClient(
            # A server without keys ignores the first.
            headers={
                "Authorization": f"Bearer {secret.key or 'none'}",
                "Accept": "application/json",
                "Accept-Encoding": "gzip, deflate",
                "Content-Type": "application/json",
            }
            | {name: value for name, value in owner.items() if value},
            timeout=None,  # post() has one: httpx2's own limits start again with every byte that arrives
            follow_redirects=False,
            limits=httpx2.Limits(max_connections=endpoint.concurrency),
        )  # fmt: skip

    async def __aenter__(self) -> Transport:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def post(self, content: Mapping[str, Any], seconds: float) -> Answer:
        """seconds: for one whole answer, from the moment the request is sent.

        Raises Unusable where none came, where it is too large or not to be read, and for a redirect to another address.
        """
        url, body = self._url, json.dumps(content).encode()
        for _ in range(MOST_REDIRECTS + 1):
            while wait := self._pace.delay():
                await asyncio.sleep(wait)
            self._pace.take()
            self.sent += 1
            try:
                async with asyncio.timeout(seconds):
                    answer, target = await self._once(url, body)
            except TimeoutError:
                raise Unusable(f"no answer: no whole answer in {seconds:g} s") from None
            except Unusable:
                raise
            except Exception as error:  # whatever a broken server makes of the client, the next request may fare better
                told = self._secret.mask(str(error)) or type(error).__name__
                raise Unusable(f"no answer: {told}") from None
            if target is None:
                return answer
            url = target
        raise Unusable(f"the server redirects more than {MOST_REDIRECTS} times: check endpoint.base_url", hopeless=True)

    async def _once(self, url: httpx2.URL, body: bytes) -> tuple[Answer, httpx2.URL | None]:
        """The answer, and where it redirects to within this very server."""
        request = self._client.build_request("POST", url, content=body)
        response = await self._client.send(request, stream=True)
        try:
            status = response.status_code
            if 300 <= status < 400:
                return Answer(status, b"", 0.0), self._redirect(url, status, response.headers.get("location", ""))
            if "event-stream" in response.headers.get("content-type", "").lower():
                raise Unusable("the server streams its answer, which nobody asked it to", billed=True, lasting=True)
            content = await self._read(response)
            return Answer(status, content, _seconds(response.headers.get("retry-after", ""))), None
        finally:
            await response.aclose()

    def _redirect(self, url: httpx2.URL, status: int, location: str) -> httpx2.URL:
        location = self._secret.mask(location)
        try:
            target = url.join(location)
        except Exception:  # no address at all
            target = httpx2.URL()
        here, there = ((u.scheme, u.host, u.port) for u in (url, target))
        # Any other status would turn the request into another one.
        if here != there or status not in (307, 308):
            raise Unusable(
                f"HTTP {status}: the server redirects to {location[:200] or 'nowhere'}, and requests, with the key, go "
                "to no other address than endpoint.base_url: set that to the new one if you trust it",
                hopeless=True,
            )
        return target

    async def _read(self, response: httpx2.Response) -> bytes:
        """The body, decompressed here: a small one may stand for gigabytes."""
        encodings = [e.strip().lower() for e in response.headers.get("content-encoding", "").split(",")]
        encodings = [e for e in encodings if e not in ("", "identity")]
        if len(encodings) > 1 or not {*encodings} <= {"gzip", "x-gzip", "deflate"}:
            raise Unusable(
                f"the body's encoding {', '.join(encodings)[:40]} was not asked for", billed=True, lasting=True
            )
        inflate = zlib.decompressobj(_INFLATE) if encodings else None
        content, came = bytearray(), 0
        async for chunk in response.aiter_raw():
            came += len(chunk)
            content += inflate.decompress(chunk, self._limit + 1 - len(content)) if inflate else chunk
            if max(len(content), came) > self._limit:
                mib = self._limit / 2**20
                raise Unusable(
                    f"the body of the answer is larger than {mib:g} MiB (endpoint.max_answer_mib)",
                    billed=True,
                    lasting=True,
                )
        if inflate and came and not inflate.eof:
            raise Unusable("no answer: the compressed body has no end")
        return bytes(content)


def _seconds(after: str) -> float:
    """What Retry-After says, seconds or a date, at most a minute."""
    try:
        wait = float(after)
    except ValueError:
        try:
            wait = (
                parsedate_to_datetime(after).astimezone(UTC) - datetime.fromtimestamp(time.time(), UTC)
            ).total_seconds()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return min(wait, LONGEST_WAIT_S) if wait > 0 else 0.0  # NaN is not above 0
