"""Servers that are hostile or broken in what they say: whole HTTP answers, and bodies, for the tests of collect."""

from __future__ import annotations

import gzip
import json
import time
import zlib
from typing import Any

from tests.support.openai_server import Handler, completion


def raw(handler: Handler, text: str | bytes, status: int = 200, **headers: str) -> None:
    handler.reply(status, text if isinstance(text, bytes) else text.encode(), **headers)


def with_fields(text: Any = "Paid for.", **fields: str) -> bytes:
    """A completion whose fields are given as JSON text, so that they may be what no Python value is."""
    body = {name: value for name, value in completion(text).items() if name not in fields}
    return "".join([json.dumps(body)[:-1], *(f', "{name}": {value}' for name, value in fields.items()), "}"]).encode()


def bomb(handler: Handler, mib: int = 64) -> None:
    """A gzip body that is a thousand times as large when it is read."""
    raw(handler, gzip.compress(b" " * (mib << 20)), Content_Encoding="gzip")


def flood(handler: Handler) -> None:
    """A chunked body as fast as it goes, without an end."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    block = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    end = time.monotonic() + 20
    while time.monotonic() < end:
        handler.wfile.write(block)
    handler.close_connection = True


def stream(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", "text/event-stream")
    handler.end_headers()
    handler.wfile.write(b'data: {"choices": []}\n\n')
    handler.wfile.flush()
    time.sleep(1)
    handler.close_connection = True


def deflated(text: str) -> bytes:
    return zlib.compress(json.dumps(completion(text)).encode())
