"""A client of the discriminator service (docs/guide/service.md), of Python's own library alone: it loads no torch.

    client = DiscriminatorClient()
    answer = client.score_and_update([TextGroup(prompt="..", teacher_response="..", samples=["..", ".."])])
    answer.rewards

A request that gets no answer is sent again under the same id, so that a group is trained on once whatever the network,
the server or a time limit does.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import random
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import OpenerDirector, ProxyHandler, Request, build_opener

from gadcore.errors import UserError

DEFAULT_URL = "http://127.0.0.1:8640"
TOKEN_VARIABLE = "GADCORE_TOKEN"
# Answers after which the same request may do better.
_AGAIN = (408, 429, 502, 503, 504)
_LONGEST_WAIT_S = 30.0
_MOST_BYTES = 1 << 28


class ServiceError(UserError):
    """What the service refuses, or that it does not answer. status: of HTTP, 0 without an answer. code: its name."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True)
class TextGroup:
    """A prompt with its teacher's response and samples of the student, as text.

    prompt, or messages ({"role": .., "content": ..}, the user's at the end). teacher_response: the teacher's text.
    row: a row of the service's data.train (from 0) in place of teacher_response, and of the prompt where none is given.
    finished: whether each sample ended by itself, else a limit cut it; default all did. id: comes back in the answer.
    """

    samples: Sequence[str]
    prompt: str | None = None
    messages: Sequence[Mapping[str, str]] | None = None
    teacher_response: str | None = None
    row: int | None = None
    finished: Sequence[bool] | None = None
    teacher_finished: bool = True
    id: str | None = None


@dataclass(frozen=True)
class Answer:
    """version: of the weights after the request. scored_by: of those that gave the scores. trained: whether the groups
    were trained on. duplicate: whether the answer was given before, to the same request id.

    rewards: per group D(x, y_s) of its samples. teacher_scores: per group D(x, y_t). ids: as the groups had them.
    loss, accuracy, margin: of the update that the groups were part of, before it. grad_norm: None where nothing was
    trained.
    """

    version: int
    scored_by: int
    trained: bool
    duplicate: bool
    rewards: list[list[float]]
    teacher_scores: list[float]
    ids: list[str | None]
    loss: float
    accuracy: float
    margin: float
    grad_norm: float | None


class DiscriminatorClient:
    """url: of the service. token: default that of the environment's GADCORE_TOKEN, none where that is unset.

    timeout_s: for one answer. patience_s: for a request with all of its repetitions, through a server that is being
    started, is busy (429) or sleeps (503). May be used by several threads.
    """

    def __init__(
        self, url: str = DEFAULT_URL, token: str | None = None, *, timeout_s: float = 600.0, patience_s: float = 300.0
    ) -> None:
        """Raises UserError for what is no address."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"{url!r} is no address of a service: give one like {DEFAULT_URL}")
        self.url = url.rstrip("/")
        self._token = os.environ.get(TOKEN_VARIABLE) if token is None else token
        self.timeout_s, self.patience_s = timeout_s, patience_s
        local = parts.hostname in ("localhost", "127.0.0.1", "::1")
        # A proxy of the environment's cannot reach this machine's loopback.
        self._opener: OpenerDirector = build_opener(ProxyHandler({}) if local else ProxyHandler())

    def score_and_update(
        self, groups: Sequence[TextGroup], *, request_id: str | None = None, student_version: int | None = None
    ) -> Answer:
        """Scores of the groups, under the weights from before they are trained on, once per request id.

        request_id: default a new one. Raises ServiceError with the service's sentence for groups that it refuses, and
        where no answer came in patience_s.
        """
        body = {"request_id": request_id or uuid.uuid4().hex, "groups": _plain(groups)}
        return _answer(self._post("score_and_update", {**body, "student_version": student_version}))

    def score(self, groups: Sequence[TextGroup]) -> Answer:
        """Scores alone: nothing is trained."""
        return _answer(self._post("score", {"groups": _plain(groups)}))

    def freeze(self, frozen: bool = True) -> None:
        """Frozen, score_and_update only scores; freeze(False) lets it train again."""
        self._post("freeze", {"frozen": frozen})

    def checkpoint(self) -> int:
        """Saves weights and moments; returns the version to give to restore()."""
        return int(self._post("checkpoint", {})["version"])

    def restore(self, version: int) -> int:
        """Goes back to a version that checkpoint() saved; returns the new version of these weights.

        What was trained after it is undone, and its request ids are free again.
        """
        return int(self._post("restore", {"version": version})["version"])

    def sleep(self) -> None:
        """Returns when the model has left its device for somebody else; until wake() nothing is scored."""
        self._post("sleep", {})

    def wake(self) -> None:
        self._post("wake", {})

    def health(self) -> dict[str, Any]:
        """What the service is at: status, version, waiting groups. Not repeated: ServiceError where it is not there."""
        return self._once("GET", "/healthz", None)

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        try:
            content = json.dumps(body, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise UserError(f"the request cannot be written as JSON ({error}): give texts, numbers and lists") from None
        end, wait = time.monotonic() + self.patience_s, 0.1
        while True:
            try:
                return self._once("POST", f"/v1/{path}", content)
            except ServiceError as error:
                after = error.__cause__.headers.get("Retry-After") if isinstance(error.__cause__, HTTPError) else None
                pause = min(max(_seconds(after), wait * random.uniform(0.5, 1.0)), _LONGEST_WAIT_S)
                if error.status not in (0, *_AGAIN) or time.monotonic() + pause > end:
                    raise
            time.sleep(pause)
            wait = min(2 * wait, 5.0)

    def _once(self, method: str, path: str, content: bytes | None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        request = Request(self.url + path, data=content, headers=headers, method=method)
        try:
            with self._opener.open(request, timeout=self.timeout_s) as response:
                found = json.loads(_body(response))
        except HTTPError as error:
            raise _refused(error, self.url) from error
        except (URLError, OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise ServiceError(
                0, "no_answer", f"no answer from {self.url}: {reason}; is the service running?"
            ) from error
        if not isinstance(found, dict):
            raise ServiceError(
                0, "no_answer", f"{self.url} answers {str(found)[:80]!r}: is it the discriminator service?"
            )
        return found


def _body(response: Any) -> bytes:
    content: bytes = response.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError("the answer is larger than 256 MiB")
    return content


def _refused(error: HTTPError, url: str) -> ServiceError:
    try:
        told = json.loads(error.read(1 << 16))["error"]
        return ServiceError(error.code, str(told["code"]), str(told["message"]))
    except (ValueError, KeyError, TypeError, OSError, http.client.HTTPException):
        return ServiceError(error.code, "http", f"{url} answers HTTP {error.code}: is it the discriminator service?")


def _seconds(after: str | None) -> float:
    try:
        seconds = float(after or 0)
    except ValueError:
        return 0.0
    return seconds if math.isfinite(seconds) and seconds > 0 else 0.0


def _plain(groups: Sequence[TextGroup]) -> list[dict[str, Any]]:
    return [{name: value for name, value in asdict(group).items() if value is not None} for group in groups]


def _answer(found: Mapping[str, Any]) -> Answer:
    try:
        groups = found["groups"]
        return Answer(
            version=found["version"],
            scored_by=found["scored_by"],
            trained=found["trained"],
            duplicate=found["duplicate"],
            rewards=[group["scores"] for group in groups],
            teacher_scores=[group["teacher_score"] for group in groups],
            ids=[group["id"] for group in groups],
            loss=found["loss"],
            accuracy=found["accuracy"],
            margin=found["margin"],
            grad_norm=found["grad_norm"],
        )
    except (KeyError, TypeError) as error:
        raise ServiceError(0, "no_answer", f"the answer lacks {error}: the service is of another version") from None
