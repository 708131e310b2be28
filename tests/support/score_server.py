"""The HTTP face of the discriminator service, without a model: the score of a sample is the length of its text."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@contextmanager
def score_server() -> Iterator[tuple[str, list[tuple[str, dict[str, Any]]]]]:
    """(address, requests as (path, body), filled while it runs)."""
    asked: list[tuple[str, dict[str, Any]]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, body))
            trained = self.path.endswith("update")
            groups = [
                {"id": g.get("id"), "teacher_score": 100.0, "scores": [float(len(text)) for text in g["samples"]]}
                for g in body["groups"]
            ]
            answer = {
                "request_id": body.get("request_id"), "version": len(asked), "scored_by": len(asked) - 1,
                "trained": trained, "duplicate": False, "groups": groups, "loss": 0.7, "accuracy": 1.0, "margin": 1.0,
                "grad_norm": 1.0 if trained else None,
            }  # fmt: skip
            content = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
