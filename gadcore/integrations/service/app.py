"""The routes. FastAPI checks bodies, makes the OpenAPI page, and answers; what is done is the worker's."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from gadcore import __version__
from gadcore.integrations.service import owner as owning
from gadcore.integrations.service import schema
from gadcore.integrations.service.guard import error_body, headers_of
from gadcore.integrations.service.journal import JSON
from gadcore.integrations.service.metrics import Metrics
from gadcore.integrations.service.owner import Owner
from gadcore.integrations.service.refused import Refused
from gadcore.integrations.service.rows import Rows, check_limits, sentence
from gadcore.integrations.service.settings import ServiceConfig
from gadcore.integrations.service.worker import Worker

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schema.ErrorOut, "description": text}
    for status, text in {
        401: "no token, or a wrong one",
        409: "the request id was used for other groups",
        413: "the body is too large",
        422: "the request cannot be served as it is",
        429: "too much waits: ask again after Retry-After seconds",
        500: "nothing was trained",
        503: "asleep, or being stopped: ask again",
    }.items()
}


def make_app(config: ServiceConfig, worker: Worker, rows: Rows, metrics: Metrics) -> FastAPI:
    """The application around a worker that has started; it stops the worker as it is shut down."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(worker.stop)

    app = FastAPI(
        title="gadcore discriminator", version=__version__, lifespan=lifespan, redoc_url=None, responses=_ERRORS,
        description="Scores of a co-trained discriminator as rewards: docs/guide/service.md.",
    )  # fmt: skip
    _add_errors(app)
    _add_measuring(app, metrics)

    def request_of(body: schema.ScoreIn, request_id: str) -> owning.Request:
        check_limits(body.groups, config.service)
        digest = hashlib.sha256(body.model_dump_json(include={"groups"}).encode()).hexdigest()
        return owning.Request(request_id, digest, [rows.resolve(group) for group in body.groups])

    @app.post("/v1/score_and_update")
    async def score_and_update(body: schema.ScoreAndUpdateIn) -> schema.ScoresOut:
        """Scores the groups under the weights of now, and trains on them, once per request id."""
        future, duplicate = worker.train(request_of(body, body.request_id))
        if duplicate:
            metrics.duplicates.inc()
        if body.student_version is not None:
            metrics.student_version.set(body.student_version)
        return schema.ScoresOut(**await _of(future), duplicate=duplicate)

    @app.post("/v1/score")
    async def score(body: schema.ScoreIn) -> schema.ScoresOut:
        """Scores the groups; nothing is trained."""
        answer = await _of(worker.score(request_of(body, "")))
        return schema.ScoresOut(**{**answer, "request_id": None}, duplicate=False)

    @app.post("/v1/freeze")
    async def freeze(body: schema.FreezeIn) -> schema.FrozenOut:
        """Frozen, score_and_update only scores; that outlasts a restart."""
        await _of(worker.do(lambda owner: owner.freeze(body.frozen)))
        return schema.FrozenOut(version=_owner(worker).version, frozen=body.frozen)

    @app.post("/v1/checkpoint")
    async def checkpoint(body: schema.Nothing) -> schema.VersionOut:
        """Saves weights and moments after all that was asked for before; the answer is what restore takes."""
        return schema.VersionOut(version=await _of(worker.do(lambda owner: owner.checkpoint())))

    @app.post("/v1/restore")
    async def restore(body: schema.RestoreIn) -> schema.VersionOut:
        """Back to a saved version, as a new one. Request ids from after it are free again."""

        def call(owner: Owner) -> int:
            if owner.asleep:
                raise Refused(503, "asleep", "the discriminator sleeps: POST /v1/wake first", 1)
            return owner.restore(body.version)

        return schema.VersionOut(version=await _of(worker.do(call)))

    @app.post("/v1/sleep")
    async def sleep(body: schema.Nothing) -> schema.AsleepOut:
        """Answers when the model has left its device."""
        await _of(worker.do(lambda owner: owner.sleep()))
        return schema.AsleepOut(version=_owner(worker).version, asleep=True)

    @app.post("/v1/wake")
    async def wake(body: schema.Nothing) -> schema.AsleepOut:
        """Answers when the model is back."""
        await _of(worker.do(lambda owner: owner.wake()))
        return schema.AsleepOut(version=_owner(worker).version, asleep=False)

    @app.get("/healthz")
    async def healthz() -> schema.HealthOut:
        """Whether it serves. Needs no token."""
        if worker.error is not None:
            raise Refused(500, "dead", f"the discriminator has ended: {worker.error}")
        owner = _owner(worker)
        return schema.HealthOut(
            status="asleep" if owner.asleep else "ready", model=config.discriminator.model, version=owner.version,
            frozen=owner.frozen, waiting_groups=worker.waiting_groups,
        )  # fmt: skip

    @app.get("/metrics", response_class=Response)
    async def show_metrics() -> Response:
        """For Prometheus."""
        owner = _owner(worker)
        for gauge, value in (
            (metrics.version, owner.version), (metrics.asleep, owner.asleep), (metrics.frozen, owner.frozen),
            (metrics.waiting, worker.waiting_groups), (metrics.model_seconds, owner.model_s),
        ):  # fmt: skip
            gauge.set(value)
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return app


def _owner(worker: Worker) -> Owner:
    if worker.owner is None:
        raise Refused(503, "stopping", "the service has not started: ask again", 5)
    return worker.owner


async def _of(future: Future[JSON]) -> JSON:
    # A client that has gone takes nothing with it: what it asked for is done, and kept for its repetition.
    return await asyncio.shield(asyncio.wrap_future(future))


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        return JSONResponse(error_body(error.code, error.message), error.status, dict(headers_of(error)))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first, *more = error.errors()
        if first["type"] == "json_invalid":
            reason = first.get("ctx", {}).get("error", "it cannot be read")
            return JSONResponse(error_body("json", f"the body is no JSON: {reason}"), 422)
        told = "; ".join(map(sentence, (first, *more[:2]))) + (f" (and {len(more) - 2} more)" if len(more) > 2 else "")
        return JSONResponse(error_body("invalid", told), 422)

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> JSONResponse:
        told = f"{request.method} {request.url.path[:80]}: {error.detail}; /docs lists what there is"
        return JSONResponse(error_body("http", told), error.status_code)


def _add_measuring(app: FastAPI, metrics: Metrics) -> None:
    @app.middleware("http")
    async def measure(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        start = time.perf_counter()
        response = await call_next(request)
        route = request.scope.get("route")
        path = getattr(route, "path", "other")
        metrics.requests.labels(path, response.status_code).inc()
        metrics.request_seconds.labels(path).observe(time.perf_counter() - start)
        return response
