"""python -m gadcore.run serve-discriminator: a discriminator that other people's trainers ask for rewards, over HTTP.

    python -m gadcore.run serve-discriminator --discriminator.model smollm2-135m-instruct --data.train answers.jsonl

On loopback unless another host is named, which needs a token in the environment (GADCORE_TOKEN). The same command goes
on where the service was stopped, or killed.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from gadcore.config import loading
from gadcore.errors import UserError
from gadcore.files import LOCK, held, write_whole
from gadcore.integrations.service.settings import ServiceConfig
from gadcore.text import say

if TYPE_CHECKING:
    import uvicorn

    from gadcore.integrations.service.metrics import Metrics
    from gadcore.integrations.service.owner import Owner
    from gadcore.integrations.service.rows import Rows
    from gadcore.integrations.service.worker import Worker
    from gadcore.models.discriminator import Discriminator, Scores

_NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def main(arguments: Sequence[str], prepare: Callable[[ServiceConfig], None] | None = None) -> int:
    """Runs the command until a signal stops it; returns the exit code. Raises UserError for whatever the user has to
    mend.

    prepare: called with the settings before torch is loaded.
    """
    config = loading.load(arguments, ServiceConfig)
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise UserError(f"serve-discriminator needs {', '.join(missing)}: pip install 'gadcore[serve]'")
    settings = config.service
    token = os.environ.get(settings.token_variable) or None
    if token is None and not settings.on_loopback:
        raise UserError(
            f"service.host = {settings.host} can be reached from other machines: put a token into the environment "
            f"variable {settings.token_variable}, which clients send too, or listen on 127.0.0.1"
        )
    if token is not None and not (token.isascii() and token.isprintable()):
        raise UserError(f"the token in {settings.token_variable} must be printable ASCII: choose another one")
    if prepare is not None:
        prepare(config)
    folder = Path(settings.dir).expanduser()
    new = not folder.exists()
    try:
        with held(folder / LOCK, f"the folder {folder}"):
            return serve(config, token)
    except UserError:
        if new:
            # Bad data leaves nothing behind; what was written by then stays.
            with suppress(OSError):
                folder.rmdir()
        raise


def serve(config: ServiceConfig, token: str | None) -> int:
    """Loads, goes on or warms up, and listens until SIGTERM or SIGINT; returns the exit code."""
    from gadcore.config.device import quiet

    quiet()
    settings = config.service
    # Before the model, whose loading takes long: a port that is taken is told at once.
    bound = _bound(settings.host, settings.port)
    server, worker, rows = start(config, token)
    assert worker.owner is not None
    write_whole(Path(settings.dir).expanduser() / "config.toml", loading.dump(config))
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = f"http://{host}:{bound.getsockname()[1]}"
    say(
        f"the discriminator {config.discriminator.model}, version {worker.owner.version}, at {address} "
        f"({len(rows)} rows; {'with a token' if token else 'without a token'}; {address}/docs)"
    )
    # uvicorn raises what has stopped it once more as it returns: by then all is saved.
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=[bound])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if not worker.closed:
        say("gadcore: the service has ended at once; the same command goes on from its journal", sys.stderr)
        return 1
    say(f"stopped at version {worker.owner.version}; {settings.dir}/discriminator holds the model")
    return 0


def start(config: ServiceConfig, token: str | None) -> tuple[uvicorn.Server, Worker, Rows]:
    """A server that is to be run, and the worker behind it, whose discriminator is ready; it ends with the server."""
    import uvicorn

    from gadcore.integrations.service.app import make_app
    from gadcore.integrations.service.guard import Guard
    from gadcore.integrations.service.metrics import Metrics
    from gadcore.integrations.service.rows import Rows
    from gadcore.integrations.service.worker import Worker

    settings, metrics, rows = config.service, Metrics(), Rows(config.data)
    worker = Worker(settings, metrics, on_death=lambda: setattr(server, "should_exit", True))
    app = Guard(
        make_app(config, worker, rows, metrics),
        token=token,
        most_bytes=int(settings.most_body_mib * 2**20),
        body_seconds=settings.body_seconds,
        only_local=settings.on_loopback,
    )
    serving = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="on",
        limit_concurrency=settings.most_connections,
        timeout_graceful_shutdown=30,
        server_header=False,
    )
    server = uvicorn.Server(serving)
    for note in worker.start(lambda: _make(config, rows, metrics)):
        say(f"gadcore: {note}")
    return server, worker, rows


def _bound(host: str, port: int) -> socket.socket:
    """A socket at the address, which nobody can connect to yet. UserError where it cannot be had."""
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
    except OSError as error:
        made.close()
        raise UserError(
            f"cannot listen on service.host = {host}, service.port = {port}: {error.strerror or error}; choose others"
        ) from None
    return made


def _make(config: ServiceConfig, rows: Rows, metrics: Metrics) -> tuple[Owner, list[str]]:
    from gadcore.config.device import device_of
    from gadcore.config.settings import Config, RunSettings
    from gadcore.integrations.service.owner import Owner
    from gadcore.integrations.service.rows import read_samples
    from gadcore.models.discriminator import Discriminator
    from gadcore.models.spec import ModelSpec

    settings, samples = config.service, config.service.warmup_samples
    texts = None if samples is None else read_samples(Path(samples), rows)
    spec = ModelSpec.resolve(
        config.discriminator.model, system_prompt=config.data.system_prompt, arguments=config.data.template_arguments
    )
    discriminator = Discriminator.load(
        spec,
        config.discriminator,
        device=device_of(Config(run=RunSettings(device=config.run.device))),
        seed=config.run.seed,
        micro_batch_tokens=settings.micro_batch_tokens,
    )
    owner = Owner(discriminator, config, on_update=metrics.updated)

    def warmup(model: Discriminator) -> None:
        if texts is None or not settings.warmup_steps:
            return
        count, done = settings.warmup_steps, 0

        def tell(found: Scores) -> None:
            nonlocal done
            done += 1
            say(f"warmup {done}/{count}: loss {found.loss:.4f}, accuracy {found.accuracy:.3f}")

        groups = owner.groups_of(texts)
        model.warmup(groups, steps=count, batch_size=settings.warmup_groups, seed=config.run.seed, on_step=tell)

    return owner, owner.begin(warmup)
