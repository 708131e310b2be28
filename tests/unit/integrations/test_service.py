"""The service over HTTP, in this process: answers, repetitions, batches, sentences for whatever is wrong."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from gadcore import Discriminator
from gadcore.errors import UserError
from gadcore.integrations.client import Answer, DiscriminatorClient, ServiceError, TextGroup
from gadcore.integrations.service.command import main
from tests.support.service import running, settings
from tests.support.service_client import group

pytest.importorskip("fastapi")
TOKEN = "a-token-of-the-tests"


@pytest.fixture(scope="module")
def service(module_folder: Path):
    sections = settings(module_folder, service__most_body_mib=0.0625, service__most_characters=2000,
                        service__most_groups=5, service__most_samples=4, service__body_seconds=1.0)  # fmt: skip
    with running(sections, TOKEN) as (url, worker):
        yield url, worker


@pytest.fixture
def client(service) -> DiscriminatorClient:
    return DiscriminatorClient(service[0], TOKEN, patience_s=20)


def post(url: str, path: str, body: bytes, **headers: str) -> tuple[int, dict[str, str], Any]:
    """(status, headers, JSON) of a request as it stands."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
    sent = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("POST", path, body, {name: value for name, value in sent.items() if value})
    response = connection.getresponse()
    return response.status, dict(response.headers), json.loads(response.read())


def test_scores_are_those_of_the_library_and_an_update_is_its_update(module_folder: Path, client) -> None:
    d = Discriminator.load(str(module_folder / "model"), device="cpu", seed=3)
    texts = group("first"), TextGroup(row=2, samples=["At zero.", "Stop"], finished=[True, False])
    made = [
        d.group(texts[0].prompt, texts[0].teacher_response, texts[0].samples, texts[0].finished),
        d.group("When does water freeze? 0", "At zero degrees.", texts[1].samples, texts[1].finished),
    ]
    version = client.health()["version"]
    found = client.score(texts)
    assert version == 0 and (found.version, found.scored_by, found.trained, found.duplicate) == (0, 0, False, False)
    expected = d.score(made)
    assert found.rewards == expected.rewards and found.teacher_scores == expected.teacher_scores
    assert found.ids == ["first", None] and found.grad_norm is None
    first = client.score_and_update(texts, request_id="first", student_version=7)
    trained = d.update(made, lr=1e-4)
    assert (first.version, first.scored_by, first.trained) == (1, 0, True) and first.rewards == found.rewards
    assert (first.loss, first.accuracy, first.grad_norm) == (trained.loss, trained.accuracy, trained.grad_norm)
    after = client.score(texts)
    assert after.rewards == d.score(made).rewards and after.version == 1


def test_a_repetition_gets_the_answer_and_trains_nothing(client) -> None:
    one = client.score_and_update([group("x")], request_id="repeated")
    two = client.score_and_update([group("x")], request_id="repeated")
    assert two.duplicate and not one.duplicate and (two.rewards, two.version) == (one.rewards, one.version)
    assert client.health()["version"] == one.version
    with pytest.raises(ServiceError, match="the request id 'repeated' was used for other groups") as refused:
        client.score_and_update([group("y")], request_id="repeated")
    assert (refused.value.status, refused.value.code) == (409, "other_groups")


def test_frozen_it_scores_and_the_repetition_still_trains_nothing(client) -> None:
    version = client.health()["version"]
    client.freeze()
    one = client.score_and_update([group("f")], request_id="frozen")
    assert (one.version, one.scored_by, one.trained) == (version, version, False) and client.health()["frozen"]
    client.freeze(False)
    assert client.score_and_update([group("f")], request_id="frozen").duplicate
    assert client.health()["version"] == version


def test_back_to_a_checkpoint_and_the_same_ids_train_again(client) -> None:
    saved, before = client.checkpoint(), client.score([group("probe")])
    one = client.score_and_update([group("r")], request_id="again")
    client.score_and_update([group("s")])
    restored = client.restore(saved)
    assert restored > one.version and client.score([group("probe")]).rewards == before.rewards
    two = client.score_and_update([group("r")], request_id="again")
    assert not two.duplicate and two.version == restored + 1 and two.rewards == one.rewards
    with pytest.raises(ServiceError, match="there is no checkpoint of version 9999"):
        client.restore(9999)


def test_asleep_it_says_so_and_awake_it_goes_on(client, service) -> None:
    client.sleep()
    impatient = DiscriminatorClient(service[0], TOKEN, patience_s=0)
    for ask in (lambda: impatient.score([group("z")]), lambda: impatient.score_and_update([group("z")])):
        with pytest.raises(ServiceError, match="the discriminator sleeps: POST /v1/wake first") as refused:
            ask()
        assert refused.value.status == 503
    assert impatient.health()["status"] == "asleep"
    threading.Timer(0.5, client.wake).start()
    assert client.score_and_update([group("z")]).trained  # it waits for the other one's wake


GROUP = {"prompt": "x", "teacher_response": "y", "samples": ["z"]}


@pytest.mark.parametrize(
    ("body", "status", "code", "message"),
    [
        ("{", 422, "json", "the body is no JSON: "),
        ('{"groups": [{"prompt": NaN, "teacher_response": "y", "samples": ["z"]}]}', 422, "invalid",
         "groups.0.prompt: must be a valid string"),
        ({"groups": [{"row": 0, "sampels": ["z"]}]}, 422, "invalid",
         "groups.0.samples: field required; groups.0.sampels: extra inputs are not permitted"),
        ({"groups": []}, 422, "invalid", "groups: list should have at least 1 item"),
        ({"groups": [GROUP | {"row": 1}]}, 422, "invalid", "groups.0: has row and teacher_response: give one of them"),
        ({"groups": [GROUP | {"more": 1}]}, 422, "invalid", "groups.0.more: extra inputs are not permitted"),
        ({"groups": [GROUP | {"finished": [True, True]}]}, 422, "invalid",
         "groups.0: has 1 samples and 2 finished flags: give one each"),
        ({"groups": [{"row": 10, "samples": ["z"]}]}, 422, "unknown_row", "row 10 is unknown: "),
        ({"groups": [GROUP | {"prompt": " "}]}, 422, "unfit", "the prompt has no text: leave it out"),
        ({"groups": [GROUP | {"messages": [{"role": "assistant", "content": "x"}], "prompt": None}]}, 422, "unfit",
         "the turn that is answered must be the user's, found 'assistant'"),
        ({"groups": [GROUP | {"prompt": "long " * 300}]}, 422, "unfit",
         "a prompt with its teacher's response needs "),
        ({"groups": [GROUP] * 6}, 422, "too_large", "the request has 6 groups, the service takes 5"),
        ({"groups": [GROUP | {"samples": ["z"] * 5}]}, 422, "too_large", "groups.0 has 5 samples, the service takes 4"),
        ({"groups": [GROUP | {"samples": ["z" * 2001]}]}, 422, "too_large", "groups.0.samples.0 has 2001 characters"),
        ({"groups": [GROUP | {"prompt": "x" * 70000}]}, 413, "too_large", "the body is larger than 0.0625 MiB"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_in_one_sentence(service, body, status: int, code: str, message: str) -> None:
    content = body if isinstance(body, str) else json.dumps(body)
    found, _, told = post(service[0], "/v1/score", content.encode())
    assert (found, told["error"]["code"]) == (status, code) and told["error"]["message"].startswith(message), told
    assert "\n" not in told["error"]["message"] and set(told) == {"error"}


def test_who_may_ask(service) -> None:
    url, body = service[0], json.dumps({"groups": [GROUP]}).encode()
    for header, message in (("", "there is no token"), ("Bearer wrong", "the token is wrong"), (TOKEN, "the token is")):
        status, headers, told = post(url, "/v1/score", body, Authorization=header)
        assert status == 401 and told["error"]["message"].startswith(message) and TOKEN not in str(told)
        assert headers["www-authenticate"] == "Bearer"
    status, _, told = post(url, "/v1/score", body, Content_Type="text/plain")
    assert (status, told["error"]["code"]) == (415, "content_type")
    # A page of the web that has made its own name mean this machine.
    status, _, told = post(url, "/v1/score", body, Host="evil.example")
    assert (status, told["error"]["code"]) == (403, "host")
    assert post(url, "/v1/nothing", b"{}")[0] == 404


def test_a_client_that_hangs_or_goes_away_holds_nobody_up_and_loses_nothing(service, client) -> None:
    host, port = urlsplit(service[0]).netloc.split(":")
    body = json.dumps({"request_id": "gone", "groups": [{**GROUP, "id": "gone"}]}).encode()
    head = (
        f"POST /v1/score_and_update HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {TOKEN}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode()
    with socket.create_connection((host, int(port))) as hangs, socket.create_connection((host, int(port))) as leaves:
        hangs.sendall(head + body[:10])
        leaves.sendall(head + body)
        leaves.close()
        version = client.health()["version"]
        found = client.score_and_update(
            [TextGroup(["z"], prompt="x", teacher_response="y", id="gone")], request_id="gone"
        )
        assert found.version == version + 1 or (found.duplicate and found.version == version)
        assert client.score_and_update([group("after")]).version == found.version + 1
        hangs.settimeout(20)
        assert hangs.recv(100).startswith(b"HTTP/1.1 408")


def test_the_pages_for_people_and_machines(service, client) -> None:
    host = urlsplit(service[0]).netloc
    connection = http.client.HTTPConnection(host, timeout=20)
    connection.request("GET", "/openapi.json")
    paths = json.loads(connection.getresponse().read())["paths"]
    routes = ("score_and_update", "score", "freeze", "checkpoint", "restore", "sleep", "wake")
    assert {f"/v1/{name}" for name in routes} | {"/healthz", "/metrics"} == set(paths)
    before = client.health()["version"]
    client.score_and_update([group("m"), group("n")], student_version=12)
    connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {TOKEN}"})
    lines = dict(
        line.rsplit(" ", 1) for line in connection.getresponse().read().decode().splitlines() if line[:1] != "#"
    )
    assert float(lines["gadcore_version"]) == before + 1 and float(lines["gadcore_student_version"]) == 12
    assert float(lines["gadcore_groups_total"]) >= 2 and float(lines["gadcore_model_seconds"]) > 0
    assert float(lines['gadcore_requests_total{path="/v1/score_and_update",status="200"}']) >= 1
    assert 0 <= float(lines["gadcore_accuracy"]) <= 1 and float(lines["gadcore_waiting_groups"]) == 0


def test_groups_become_updates_by_count_or_by_time_and_too_many_do_not_wait(tmp_path: Path) -> None:
    sections = settings(tmp_path, service__batch_groups=4, service__batch_seconds=300, service__waiting_groups=6)
    with running(sections) as (url, worker), ThreadPoolExecutor(12) as pool:
        client = DiscriminatorClient(url, patience_s=200)

        def ask(name: str, groups: int = 1) -> Answer:
            return client.score_and_update([group(f"{name}{k}") for k in range(groups)], request_id=name)

        def wait_at_most(seconds: float) -> None:
            with worker._changed:
                worker._settings = worker._settings.model_copy(update={"batch_seconds": seconds})
                worker._changed.notify()

        four = list(pool.map(ask, "abcd"))
        assert {(a.version, a.scored_by) for a in four} == {(1, 0)} and len({a.loss for a in four}) == 1
        assert ask("many", 5).version == 2
        # A checkpoint sees what came before it, and does not wait for more.
        waits = pool.submit(ask, "waits")
        while not worker.waiting_groups:
            time.sleep(0.01)
        assert client.checkpoint() == 3 and waits.result().version == 3
        impatient = DiscriminatorClient(url, patience_s=0)
        three = pool.submit(ask, "three", 3)
        while not worker.waiting_groups:
            time.sleep(0.01)
        with pytest.raises(ServiceError, match="3 groups wait, the service takes 6 .* ask again in") as refused:
            impatient.score_and_update([group(str(k)) for k in range(4)])
        assert refused.value.status == 429 and not three.done()
        wait_at_most(0.5)
        # Whoever waits as he is told gets his turn.
        assert client.score_and_update([group(str(k)) for k in range(4)]).version == 5 and three.result().version == 4
        start = time.monotonic()
        assert ask("late").version == 6 and time.monotonic() - start >= 0.5


def test_what_the_command_refuses(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("GADCORE_TOKEN", raising=False)
    with pytest.raises(UserError, match="put a token into the environment variable GADCORE_TOKEN"):
        main(["--service.host", "0.0.0.0"])
    monkeypatch.setenv("GADCORE_TOKEN", "mön")
    with pytest.raises(UserError, match="must be printable ASCII"):
        main([])
    monkeypatch.delenv("GADCORE_TOKEN")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen on service.host = 127.0.0.1, service.port = {port}"):
            main(["--service.port", str(port), "--service.dir", str(tmp_path / "service")])
    # What cannot be served leaves nothing behind.
    with pytest.raises(UserError, match="nowhere.jsonl"):
        main(["--data.train", "nowhere.jsonl", "--service.port", "0", "--service.dir", str(tmp_path / "service")])
    assert not (tmp_path / "service").exists()


def test_what_the_client_refuses() -> None:
    with pytest.raises(UserError, match="is no address of a service"):
        DiscriminatorClient("127.0.0.1:8640")
    with pytest.raises(ServiceError, match="no answer from http://127.0.0.1:9: .* is the service running?"):
        DiscriminatorClient("http://127.0.0.1:9", patience_s=0).score([group("a")])
    with pytest.raises(UserError, match="cannot be written as JSON"):
        DiscriminatorClient("http://127.0.0.1:9").score([TextGroup([float("nan")])])  # type: ignore[list-item]


def test_a_warmup_comes_first_and_once(tmp_path: Path, capsys) -> None:
    rows = [{"row": k, "samples": ["Stop", "Zero degrees of it"]} for k in range(6)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changed = {"service__warmup_samples": str(tmp_path / "samples.jsonl"), "service__warmup_steps": 12}
    sections = settings(tmp_path, **changed, service__warmup_groups=4, discriminator__lr=3e-3)
    with running(sections) as (url, _):
        found = DiscriminatorClient(url).score([TextGroup(row=0, samples=["Stop"])])
        assert found.version == 0 and found.accuracy == 1
    assert "warmup 12/12: loss" in capsys.readouterr().out
    with running(sections) as (url, _):
        assert DiscriminatorClient(url).score([TextGroup(row=0, samples=["Stop"])]).rewards == found.rewards
    assert "warmup" not in capsys.readouterr().out
    (tmp_path / "samples.jsonl").write_text(json.dumps({"row": 99, "samples": ["x"]}) + "\n")
    sections["service"]["dir"] = str(tmp_path / "other")
    with pytest.raises(UserError, match="samples.jsonl:1: row 99 is unknown"), running(sections):
        pass
