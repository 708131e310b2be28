"""An OpenAI-compatible server on loopback that answers by a formula, or misbehaves as it is told; it keeps a log."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]


def answer_to(prompt: str) -> str:
    return f"The answer to {prompt!r} is {sum(map(ord, prompt))}."


def completion(text: str | None, finish_reason: str | None = "stop", **message: Any) -> Body:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "model": "teacher-2026",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text, **message},
                "finish_reason": finish_reason,
            }
        ],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
    }


class Server:
    """base_url: to be asked. answered: prompts whose whole answer was sent, in order; seen: all that arrived.

    behave: from (prompt, number of the attempt at it, from 0) to None for the ordinary answer, or to a function that
    does with the handler what it likes.
    """

    def __init__(self, behave: Callable[[str, int], Callable[[Handler], None] | None], delay: float) -> None:
        self.behave, self.delay = behave, delay
        self.answered: list[str] = []
        self.seen: list[str] = []
        self.bodies: list[Body] = []
        self.times: list[float] = []
        self.headers: list[Message] = []
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"owner": self}))
        self._server.daemon_threads = True
        self.base_url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def attempts(self) -> Counter[str]:
        return Counter(self.seen)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][-1]["content"]
        with self.owner.lock:
            attempt = self.owner.seen.count(prompt)
            self.owner.seen.append(prompt)
            self.owner.bodies.append(body)
            self.owner.times.append(time.monotonic())
            self.owner.headers.append(self.headers)
            self.owner.in_flight += 1
            self.owner.most_in_flight = max(self.owner.most_in_flight, self.owner.in_flight)
        try:
            act = self.owner.behave(prompt, attempt)
            if act is not None:
                act(self)
                return
            time.sleep(self.owner.delay)
            self.reply(200, completion(answer_to(prompt)))
            with self.owner.lock:
                self.owner.answered.append(prompt)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client has gone: what was not delivered is not answered
        finally:
            with self.owner.lock:
                self.owner.in_flight -= 1

    def reply(self, status: int, body: Body | bytes, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content))}.items():
            self.send_header(name, headers.pop(name.replace("-", "_"), value))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def drop(self) -> None:
        """Closes the connection without a word."""
        self.close_connection = True

    def truncate(self) -> None:
        """Promises a longer body than comes."""
        content = json.dumps(completion("cut off on the way")).encode()
        self.reply(200, content[:40], Content_Length=str(len(content)))
        self.close_connection = True

    def truncate_stream(self) -> None:
        """A chunked body without its end."""
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b'13\r\n{"choices": [{"mess\r\n')
        self.close_connection = True

    def drip(self) -> None:
        """A byte at a time, never an end: no limit on the time between bytes notices it."""
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", "100000")
        self.end_headers()
        for _ in range(200):
            self.wfile.write(b" ")
            self.wfile.flush()
            time.sleep(0.05)
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serve(
    behave: Callable[[str, int], Callable[[Handler], None] | None] = lambda prompt, attempt: None, *, delay: float = 0.0
) -> Iterator[Server]:
    with Server(behave, delay) as server:
        yield server
