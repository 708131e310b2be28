"""What is said where a vLLM server is not what it must be: a small server that answers as one would."""

from __future__ import annotations

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from gadcore.errors import UserError
from gadcore.rollout.server_client import Client, ServerGone

TOKEN = "the-token"


class Stub:
    """answers: by path, JSON or a status. log: (path, content) of what was asked."""

    def __init__(self) -> None:
        self.answers: dict = {"/health": {}, "/version": {"version": "0.32.0"}}
        self.log: list = []
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                size = int(self.headers.get("Content-Length") or 0)
                content = json.loads(self.rfile.read(size) or b"null")
                path = self.path.partition("?")[0]
                stub.log.append((self.path, content))
                open_to_all = path in ("/health", "/version")
                answer = stub.answers.get(path, 404)
                if not open_to_all and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    answer = 401
                self.send_response(answer if isinstance(answer, int) else 200)
                body = b"it broke" if isinstance(answer, int) else json.dumps(answer).encode()
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST

            def log_message(self, *_: object) -> None: ...

        class Server(ThreadingHTTPServer):
            # Connections that wait to be taken.
            request_queue_size = 64

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def stub():
    made = Stub()
    yield made
    made.close()


def client_of(stub: Stub, token: str = TOKEN) -> Client:
    return Client(stub.url, token, timeout_s=5)


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("0.11.2", "is vLLM 0.11.2; weights go to 0.32 and later alone: update it"),
        ("0.31.9", "is vLLM 0.31.9"),
        ("", "is vLLM of an unknown version"),
        ("dev", "is vLLM dev;"),
    ],
)
def test_an_old_server_is_refused(stub: Stub, version: str, said: str) -> None:
    stub.answers["/version"] = {"version": version}
    with pytest.raises(UserError, match=said):
        client_of(stub).check_version()


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1.dev3+gabc", "0.100.0", "1.0"])
def test_a_server_that_is_new_enough_is_taken(stub: Stub, version: str) -> None:
    stub.answers["/version"] = {"version": version}
    client_of(stub).check_version()


def test_a_wrong_token_is_one_sentence_without_the_token(stub: Stub) -> None:
    stub.answers["/weight_info"] = {"weight_version": "default"}
    assert client_of(stub).get("/weight_info") == {"weight_version": "default"}
    for token in ("", "another-secret"):
        with pytest.raises(UserError, match="does not take the token.*rollout.token_env") as error:
            client_of(stub, token).get("/weight_info")
        assert "another-secret" not in str(error.value) and "\n" not in str(error.value)


def test_a_server_without_the_routes_is_told_how_to_be_started(stub: Stub) -> None:
    with pytest.raises(UserError, match="has no route /weight_info.*VLLM_SERVER_DEV_MODE=1 and --enable-scale-out"):
        client_of(stub).get("/weight_info")


def test_what_a_server_says_of_an_error_is_told(stub: Stub) -> None:
    stub.answers["/start_weight_update"] = 500
    with pytest.raises(RuntimeError, match="answered /start_weight_update with 500: it broke"):
        client_of(stub).start_weight_update()


def test_nobody_there(stub: Stub) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    client = Client(f"http://127.0.0.1:{port}", TOKEN, timeout_s=5)
    with pytest.raises(ServerGone, match="cannot be reached"):
        client.get("/version")
    with pytest.raises(ServerGone, match="cannot be reached"):
        client.wait(0.3)
    with pytest.raises(ServerGone, match="cannot be reached"):
        client.generate([{}], lambda place, answer: None)

    def ended() -> None:
        raise UserError("the server ended")

    with pytest.raises(UserError, match="the server ended"):
        client.wait(5, ended)
    stub.answers["/health"] = 503
    with pytest.raises(ServerGone, match="was not ready within 0 s"):
        client_of(stub).wait(0)


def test_every_request_has_its_answer_and_an_update_its_version(stub: Stub) -> None:
    stub.answers |= {"/inference/v1/generate": {"choices": [1]}, "/finish_weight_update": {}, "/update_weights": {}}
    client, found = client_of(stub), {}
    client.generate([{"token_ids": [i]} for i in range(20)], found.__setitem__)
    assert found == dict.fromkeys(range(20), {"choices": [1]})
    assert sorted(content["token_ids"][0] for _, content in stub.log) == list(range(20))
    client.version = "gadcore-1"
    client.finish_weight_update()
    assert stub.log[-1] == ("/finish_weight_update", {"weight_version": "gadcore-1"})
    # Handles are no JSON.
    client.update_weights({"names": ["a"], "ipc_handles": {"gpu": (1, 2)}})
    assert stub.log[-1][1]["update_info"]["names"] == ["a"]
    assert isinstance(stub.log[-1][1]["update_info"]["ipc_handles_pickled"], str)
    client.close()
