"""What a server may say or do, and what it must not get: the key told on, the prompts, memory, money, the rows."""

from __future__ import annotations

import json
import resource
import string
from pathlib import Path

import pytest

from gadcore.teacher.command import main
from gadcore.teacher.reply import Reply, Unusable
from gadcore.teacher.secret import Secret
from tests.support import replies
from tests.support.collecting import arguments, prompts_file, rows
from tests.support.openai_server import Handler, completion, serve

KEY = "sk-" + "".join(f"{i:02}{letter}" for i, letter in enumerate(string.ascii_letters))  # 159 characters
ONE = ("--prompts.rows", "1", "--endpoint.max_retries", "5")


@pytest.fixture(autouse=True)
def no_waiting_between_attempts(monkeypatch) -> None:
    monkeypatch.setattr("gadcore.teacher.client.FIRST_DELAY_S", 0.001)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return prompts_file(tmp_path / "prompts.txt", 3)


LONG = "x" * 260
LEAKS = {
    "late in an error": lambda h: h.reply(400, {"error": {"message": f"{LONG} {KEY}"}}),
    "half of it in an error": lambda h: h.reply(400, {"error": {"message": f"you sent {KEY[20:60]}.. as the key"}}),
    "in an error that is no object": lambda h: h.reply(400, {"error": [{"why": KEY.upper()}], "detail": KEY}),
    "in the name of a field": lambda h: h.reply(400, {"error": {KEY: {"a": KEY}}}),
    "in a 200 with an error": lambda h: h.reply(200, {"error": {"message": f"{LONG} {KEY}", "code": 400}}),
    "in a body that is no JSON": lambda h: replies.raw(h, "y" * 40 + KEY),
    "in a body that is no JSON, refused": lambda h: replies.raw(h, "y" * 270 + KEY, 400),
    "in a list": lambda h: replies.raw(h, json.dumps(["z" * 50, KEY])),
    "escaped": lambda h: replies.raw(h, '{"error": "' + "".join(f"\\u{ord(c):04x}" for c in KEY) + '"}', 400),
    "in a good answer": lambda h: h.reply(200, completion(f"Your key is {KEY}.")),
    "in the other fields": lambda h: h.reply(
        200, completion("Good.", f"stop {KEY}") | {"model": KEY, "id": KEY, "usage": {"note": KEY, KEY: 1}}
    ),
    "in a refusal": lambda h: h.reply(200, completion(None, refusal=f"{LONG} {KEY}")),
    "in a redirect": lambda h: replies.raw(h, b"", 307, Location=f"http://localhost:9/{KEY}"),
    "in a part": lambda h: h.reply(200, completion([{"type": f"{KEY}", "text": ""}, {"type": "text", "text": KEY}])),
}


@pytest.mark.parametrize("where", LEAKS)
def test_no_piece_of_the_key_gets_anywhere(where: str, prompts: Path, tmp_path: Path, monkeypatch, capfd) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serve(lambda *_: LEAKS[where]) as server:
        main(arguments(prompts, server.base_url, tmp_path / "out", *ONE[:2], "--endpoint.max_retries", "0"))
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    told = "".join(capfd.readouterr())
    files = [path.read_text() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    pieces = {KEY[i : i + 16].lower() for i in range(len(KEY) - 15)}
    for text in (told, *files):
        assert not [piece for piece in pieces if piece in text.lower()], text
    assert any("***" in text for text in (told, *files))


def test_only_the_key_and_its_long_pieces_are_masked() -> None:
    secret = Secret(KEY)
    assert secret.mask(f"a{KEY[3:20]}b{KEY[:15]}c{KEY}") == f"a***b{KEY[:15]}c***"
    assert Secret("").mask("none") == Secret("EMPTY").mask("none") == "none"
    assert Secret("EMPTY").mask("EMPTY") == "EMPTY"  # a placeholder, and a word
    assert Secret("a-short-key").mask("my A-Short-Key!") == "my ***!" and "a-short-key" not in repr(
        Secret("a-short-key")
    )


DEEP = '{"a": ' * 900 + "1" + "}" * 900
FIELDS = {
    "huge": ({"usage": '{"prompt_tokens": 1%s, "completion_tokens": 5}' % ("0" * 400)}, "usage.prompt_tokens"),
    "too huge to parse": (
        {"usage": '{"prompt_tokens": 3, "completion_tokens": %s}' % ("9" * 5000)},
        "usage.completion",
    ),
    "true": ({"usage": '{"prompt_tokens": true, "completion_tokens": 5}'}, "usage.prompt_tokens"),
    "negative": ({"usage": '{"prompt_tokens": -1000000, "completion_tokens": 5}'}, "usage.prompt_tokens"),
    "text": ({"usage": '{"prompt_tokens": "3", "completion_tokens": 5}'}, "usage.prompt_tokens"),
    "NaN": ({"usage": '{"prompt_tokens": NaN, "completion_tokens": 5}'}, "usage.prompt_tokens"),
    "deep": ({"usage": f'{{"prompt_tokens": 3, "completion_tokens": 5, "more": {DEEP}}}'}, "nested deeper"),
    "deeper than Python reads": ({"usage": "[" * 100_000 + "]" * 100_000}, "nested deeper"),
    "a list": ({"usage": "[3, 5]"}, "usage is no object"),
    "half a pair in model": ({"model": '"m\\ud83d"'}, "model holds half"),
    "half a pair in id": ({"id": '"\\udc00"'}, "id holds half"),
    "half a pair in a count's name": ({"usage": '{"\\ud800": 1}'}, "usage.? is no count"),
    "a number for a model": ({"model": "7"}, "model is no text"),
    "a long id": ({"id": '"%s"' % ("i" * 10_000)}, "id has 10000 characters"),
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_paid_answer_is_kept_whatever_stands_beside_it(field: str, prompts: Path, tmp_path: Path, capsys) -> None:
    fields, told = FIELDS[field]
    with serve(lambda *_: lambda h: replies.raw(h, replies.with_fields(**fields))) as server:
        argv = arguments(prompts, server.base_url, tmp_path / "out", "--budget.requests", "10")
        assert main(argv) == 0
        assert len(server.seen) == 3
        out = capsys.readouterr().out
        assert "3 answered" in out
        assert "odd (3): " in out and told in out
        assert main(argv) == 0 and len(server.seen) == 3  # read back
    assert [row["teacher_response"] for row in rows(tmp_path / "out/train.jsonl")] == ["Paid for."] * 3
    for row in rows(tmp_path / "out/replies.jsonl"):
        assert all(0 < row["spent"][name] < 1000 for name in ("requests", "prompt", "response"))


def test_a_finish_reason_that_is_none_is_kept_out_of_the_rows() -> None:
    for reason in (5, ["stop"], {"a": 1}, True):
        reply = Reply.parse(json.dumps(completion("Yes.", reason)).encode())
        assert (reply.text, reply.outcome, reply.told) == ("Yes.", "other", ("finish_reason is no text: not kept",))


def test_parts_of_a_content_are_read() -> None:
    parts = [
        {"type": "text", "text": "One, "},
        {"type": "thinking", "thinking": []},
        {"type": "output_text", "text": "two."},
    ]
    reply = Reply.parse(json.dumps(completion(parts)).encode())
    assert (reply.text, reply.outcome) == ("One, two.", "answered")
    assert reply.told == ("a part of the content of type thinking was left out",)
    refused = Reply.parse(json.dumps(completion([{"type": "refusal", "refusal": "No."}])).encode())
    assert (refused.refusal, refused.outcome) == ("No.", "refused")
    with pytest.raises(Unusable, match="no content"):
        Reply.parse(json.dumps(completion([{"type": "image_url", "image_url": {}}])).encode())


LASTING = {
    "400": lambda h: h.reply(400, {"error": {"message": "max_tokens is too large"}}),
    "403": lambda h: h.reply(403, {"error": {"message": "flagged"}}),
    "400 that asks to be asked again": lambda h: h.reply(400, {"error": {}}, x_should_retry="true"),
    "no such parameter, with 200": lambda h: h.reply(
        200, {"error": {"message": "no", "type": "invalid_request_error"}}
    ),
    "too long, with 200": lambda h: h.reply(200, {"error": {"message": "no", "code": 400}}),
    "vLLM's, with 200": lambda h: h.reply(200, {"error": {"message": "no", "type": "BadRequestError", "code": "400"}}),
    "too large": lambda h: replies.raw(h, b" " * (2 << 20)),
    "a bomb": replies.bomb,
    "a flood": replies.flood,
    "a stream": replies.stream,
    "an encoding that was not asked for": lambda h: replies.raw(h, b"x", Content_Encoding="br"),
    "two encodings": lambda h: replies.raw(h, b"x", Content_Encoding="gzip, gzip"),
}
HOPELESS = {
    "401": lambda h: h.reply(401, {"error": {"message": "bad key"}}),
    "402": lambda h: h.reply(402, {"error": {"message": "no credit"}}),
    "404": lambda h: h.reply(404, b"<html>"),
    "no credit": lambda h: h.reply(429, {"error": {"message": "no credit", "code": "insufficient_quota"}}),
    "a bad key, with 200": lambda h: h.reply(200, {"error": {"message": "bad key", "code": "invalid_api_key"}}),
    "another host": lambda h: replies.raw(h, b"", 307, Location="http://localhost:9/v1/chat/completions"),
    "another scheme": lambda h: replies.raw(h, b"", 308, Location="file:///etc/passwd"),
    "no address": lambda h: replies.raw(h, b"", 307, Location="http://[::"),
    "another method": lambda h: replies.raw(h, b"", 302, Location="/v1/chat/completions"),
    "without end": lambda h: replies.raw(h, b"", 307, Location="/v1/chat/completions"),
}


@pytest.mark.parametrize("fault", LASTING | HOPELESS)
def test_a_fault_that_stays_is_met_once(fault: str, prompts: Path, tmp_path: Path, capsys) -> None:
    more = ("--endpoint.concurrency", "1", "--endpoint.max_answer_mib", "1", "--endpoint.timeout", "20")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with serve(lambda *_: (LASTING | HOPELESS)[fault]) as server:
        assert main(arguments(prompts, server.base_url, tmp_path / "out", *more)) == 1
        once = 4 if fault == "without end" else 1
        assert len(server.seen) == (once if fault in HOPELESS else 3)
    out = capsys.readouterr().out
    assert ("1 failed, 2 not asked" in out) if fault in HOPELESS else ("3 failed, 0 not asked" in out)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150 << 10  # KiB


def test_a_redirect_within_the_server_is_followed(prompts: Path, tmp_path: Path) -> None:
    def behave(prompt: str, attempt: int):
        return None if attempt else lambda h: replies.raw(h, b"", 307, Location="/v1/chat/completions")

    with serve(behave) as server:
        assert main(arguments(prompts, server.base_url, tmp_path / "out")) == 0
        assert len(server.seen) == 6


def test_prompts_go_to_no_other_host(prompts: Path, tmp_path: Path, capsys) -> None:
    with serve() as other:
        target = other.base_url.replace("127.0.0.1", "localhost") + "/chat/completions"
        with serve(lambda *_: lambda h: replies.raw(h, b"", 307, Location=target)) as server:
            assert main(arguments(prompts, server.base_url, tmp_path / "out")) == 1
        assert other.seen == []
    assert "set that to the new one if you trust it" in capsys.readouterr().out


def test_a_request_ends_in_time_however_often_it_is_tried(prompts: Path, tmp_path: Path, capsys) -> None:
    with serve(lambda *_: Handler.drip) as server:
        times = ("--endpoint.timeout", "0.3", "--endpoint.total_timeout", "0.7")
        assert main(arguments(prompts, server.base_url, tmp_path / "out", *ONE, *times)) == 1
        assert 2 <= len(server.seen) <= 3
    assert "endpoint.total_timeout leaves no time" in capsys.readouterr().out


def test_the_same_name_elsewhere_is_another_model(prompts: Path, tmp_path: Path, capsys) -> None:
    with serve() as one, serve() as two:
        for server in (one, two, one):
            assert main(arguments(prompts, server.base_url, tmp_path / "out")) == 0
        slash = arguments(prompts, one.base_url + "/", tmp_path / "out")
        assert main(slash) == 0
        assert len(one.seen) == len(two.seen) == 3
    assert "also holds 3 replies to other prompts, parameters, models or addresses" in capsys.readouterr().out


def test_replies_from_before_there_were_addresses_are_not_paid_for_again(prompts: Path, tmp_path: Path, capsys) -> None:
    with serve() as server:
        argv = arguments(prompts, server.base_url, tmp_path / "out")
        assert main(argv) == 0
        path = tmp_path / "out/replies.jsonl"
        old = [{name: value for name, value in row.items() if name != "address"} for row in rows(path)]
        path.write_text("".join(json.dumps(row | {"key": "0" * 63 + str(i)}) + "\n" for i, row in enumerate(old)))
        assert main(argv) == 0 and len(server.seen) == 3
    assert "3 lines of" in capsys.readouterr().err


def test_what_was_answered_while_the_disk_filled_is_told_once_all_have_come_back(
    prompts, tmp_path, monkeypatch
) -> None:
    from gadcore.errors import UserError
    from gadcore.teacher.store import ReplyStore

    add, calls = ReplyStore.add, []

    def once_full(self, *arguments) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            raise UserError("the disk is full")
        add(self, *arguments)

    monkeypatch.setattr(ReplyStore, "add", once_full)
    with serve(delay=0.2) as server, pytest.raises(UserError, match="the disk is full"):
        main(arguments(prompts, server.base_url, tmp_path / "out", "--endpoint.concurrency", "3"))
    assert len(server.seen) == 3 and len(rows(tmp_path / "out/replies.jsonl")) == 2


def test_nothing_that_a_server_says_is_obeyed_by_a_terminal_or_a_reader_of_markdown(
    prompts: Path, tmp_path: Path, capfd
) -> None:
    evil = "\x1b[2J\u202e<img src=x onerror=alert(1)> [a](http://evil.example) | `x` www.evil.example\x9b"
    with serve(lambda p, _: lambda h: h.reply(200, completion("Fine.", evil) | {"model": evil})
               if "0" in p else h.reply(400, {"error": {"message": evil}})) as server:  # fmt: skip
        main(arguments(prompts, server.base_url, tmp_path / "out", "--output.teacher", evil))
    card = (tmp_path / "out/README.md").read_text()
    for text in (card, *capfd.readouterr()):
        assert not {"\x1b", "\u202e", "\x9b"} & set(text)
    assert "onerror" in card and "<img" not in card and "](http" not in card
    assert "www.evil" not in card and "| `x`" not in card


@pytest.mark.parametrize("value", ["{x = nan}", "{x = 1979-05-27}", "{x = {y = inf}}"])
def test_a_request_field_that_no_request_can_hold(value: str, prompts: Path, tmp_path: Path) -> None:
    from gadcore.errors import UserError

    with pytest.raises(UserError, match=r"sampling.extra holds what a request cannot"):
        main(arguments(prompts, "http://127.0.0.1:9/v1", tmp_path / "out", "--sampling.extra", value))
