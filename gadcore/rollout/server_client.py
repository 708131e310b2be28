"""A vLLM server over HTTP, and its failures in sentences."""

from __future__ import annotations

import asyncio
import base64
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import httpx2

from gadcore.errors import UserError

# The first vLLM that tells by which weights a token was sampled, and has the routes used here.
OLDEST = (0, 32)
_CONNECT_S, _SHORT_S = 10.0, 60.0
# Requests under way at a time; the server has its own queue.
_AT_ONCE = 512


class ServerGone(RuntimeError):
    """The server cannot be reached, or ended while it worked."""


class Client:
    """Requests with a token, to one server. Also vLLM's VLLMWeightSyncClient, by its four methods.

    Raises UserError for a token that the server does not take, ServerGone where nobody answers, RuntimeError for an
    answer that is an error.
    """

    def __init__(self, url: str, token: str, *, timeout_s: float) -> None:
        """timeout_s: for one answer, however long a sample takes."""
        self.url, self._timeout_s = url.rstrip("/"), timeout_s
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        # The server closes connections that wait for some seconds, or whose answer was an error: none is used twice.
        self._client = httpx2.Client(
            headers=self._headers,
            timeout=httpx2.Timeout(timeout_s, connect=_CONNECT_S),
            limits=httpx2.Limits(max_keepalive_connections=0),
        )
        # Set at the end of an update; the server forgets it as it ends.
        self.version = ""
        self._end_generate: Callable[[], object] | None = None

    def get(self, path: str) -> Any:
        """The JSON that a route gives."""
        return self._asked(lambda: self._client.get(self.url + path, timeout=_SHORT_S), path)

    def post(self, path: str, content: Mapping[str, Any] | None = None, **query: str) -> Any:
        """The JSON that a route answers."""
        return self._asked(lambda: self._client.post(self.url + path, json=content, params=query), path)

    def _asked(self, ask: Callable[[], httpx2.Response], path: str) -> Any:
        try:
            response = ask()
        except httpx2.HTTPError as error:
            raise self._gone(error) from None
        return self._read(response, path)

    def _gone(self, error: Exception) -> ServerGone:
        return ServerGone(f"the vLLM server {self.url} cannot be reached: {type(error).__name__} {error}".rstrip())

    def _read(self, response: httpx2.Response, path: str) -> Any:
        if response.status_code in (401, 403):
            raise UserError(
                f"the vLLM server {self.url} does not take the token: give its own (VLLM_API_KEY, where the server was "
                "started) in the environment variable that rollout.token_env names"
            )
        if response.status_code == 404:
            raise UserError(
                f"the vLLM server {self.url} has no route {path}: start it as docs/guide/sampling.md says, with "
                "VLLM_SERVER_DEV_MODE=1 and --enable-scale-out"
            )
        if response.status_code >= 400:
            raise RuntimeError(
                f"the vLLM server {self.url} answered {path} with {response.status_code}: {_told(response)}"
            )
        return response.json() if response.content else None

    def wait(self, seconds: float, alive: Callable[[], None] = lambda: None) -> None:
        """Until the server is ready; ServerGone after so many seconds. alive: raises where waiting is of no use."""
        end = time.monotonic() + seconds
        while True:
            try:
                if self._client.get(self.url + "/health", timeout=_CONNECT_S).status_code == 200:
                    return
            except httpx2.HTTPError as error:
                if time.monotonic() > end:
                    raise self._gone(error) from None
            if time.monotonic() > end:
                raise ServerGone(f"the vLLM server {self.url} was not ready within {seconds:.0f} s")
            alive()
            time.sleep(0.2)

    def check_version(self) -> None:
        """UserError where the server is too old."""
        version = str(self.get("/version").get("version", ""))
        numbers = version.split(".")[:2]
        if not all(part.isdigit() for part in numbers) or tuple(map(int, numbers)) < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            raise UserError(
                f"the vLLM server {self.url} is vLLM {version or 'of an unknown version'}; weights go to {oldest} and "
                "later alone: update it"
            )

    def generate(self, bodies: Sequence[Mapping[str, Any]], done: Callable[[int, Any], None]) -> None:
        """Asks for samples of all bodies at a time. done: told the place and the answer of each as it comes."""

        async def ask_all() -> None:
            loop, task = asyncio.get_running_loop(), asyncio.current_task()
            assert task is not None
            self._end_generate = lambda: loop.call_soon_threadsafe(task.cancel)
            limits = httpx2.Limits(max_connections=_AT_ONCE, max_keepalive_connections=0)
            timeout = httpx2.Timeout(self._timeout_s, connect=_CONNECT_S, pool=None)
            async with httpx2.AsyncClient(headers=self._headers, timeout=timeout, limits=limits) as client:

                async def ask(place: int, body: Mapping[str, Any]) -> None:
                    path = "/inference/v1/generate"
                    try:
                        response = await client.post(self.url + path, json=body)
                    except httpx2.HTTPError as error:
                        raise self._gone(error) from None
                    done(place, self._read(response, path))

                async with asyncio.TaskGroup() as tasks:
                    for place, body in enumerate(bodies):
                        tasks.create_task(ask(place, body))

        try:
            asyncio.run(ask_all())
        except ExceptionGroup as errors:
            # The first says it: the others were cut off, or say the same.
            raise errors.exceptions[0] from None
        finally:
            self._end_generate = None

    def abandon(self) -> None:
        """Ends a generate() of another thread, which raises CancelledError."""
        end = self._end_generate
        # It may have come to its end in between.
        with suppress(RuntimeError):
            if end is not None:
                end()

    # vLLM's VLLMWeightSyncClient

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.post("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        try:
            self.post("/start_weight_update")
        except RuntimeError as error:
            if "already active" not in str(error):
                raise
            # A trainer before this one has ended in the middle of an update.
            self.post("/finish_weight_update")
            self.post("/start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        handles = update_info.pop("ipc_handles", None) if isinstance(update_info, dict) else None
        if handles is not None:
            # As vLLM's own client sends them: JSON has no tuples.
            update_info["ipc_handles_pickled"] = base64.b64encode(pickle.dumps(handles)).decode()
        self.post("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.post("/finish_weight_update", {"weight_version": weight_version or self.version})

    def close(self) -> None:
        self._client.close()


def _told(response: httpx2.Response) -> str:
    """What an error says, cut."""
    text = response.text.strip()
    return text[:300] + (" .." if len(text) > 300 else "")
