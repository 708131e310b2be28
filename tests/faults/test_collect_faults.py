"""A server that misbehaves, kills, budgets and keys: what is lost (nothing) and what is reported."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from gadcore.errors import UserError
from gadcore.teacher.command import main
from gadcore.teacher.store import ReplyStore
from tests.support.collecting import answered, arguments, prompts_file, rows, start
from tests.support.openai_server import Handler, answer_to, completion, serve

SECRET = "sk-VeryMuchASecret123"
QUICK = ("--endpoint.timeout", "0.5", "--endpoint.max_retries", "2")
FAULTS = {
    "drop": Handler.drop,
    "slow": Handler.drip,
    "429": lambda h: h.reply(429, {"error": {"message": "slow down"}}, Retry_After="0.2"),
    "500": lambda h: h.reply(500, {"error": {"message": "oops"}}),
    "malformed": lambda h: h.reply(200, b'{"choices": [}'),
    "html": lambda h: h.reply(200, b"<html>busy</html>", Content_Type="text/html"),
    "list": lambda h: h.reply(200, b"[1]"),
    "truncated": Handler.truncate,
    "truncated stream": Handler.truncate_stream,
    "gzip that is none": lambda h: h.reply(200, b"plain", Content_Encoding="gzip"),
    "no choices": lambda h: h.reply(200, {"choices": []}),
    "no message": lambda h: h.reply(200, {"choices": [{"finish_reason": "stop"}]}),
    "no content": lambda h: h.reply(200, completion(None)),
    "error with 200": lambda h: h.reply(200, {"error": {"message": "upstream died"}}),
}


@pytest.fixture(autouse=True)
def no_waiting_between_attempts(monkeypatch) -> None:
    """The back-off, shortened; a server's Retry-After is obeyed as it is."""
    monkeypatch.setattr("gadcore.teacher.client.FIRST_DELAY_S", 0.01)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return prompts_file(tmp_path / "prompts.txt", 4)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_loses_nothing(fault: str, prompts: Path, tmp_path: Path, capsys) -> None:
    def behave(prompt: str, attempt: int):
        return FAULTS[fault] if attempt == 0 and "1" in prompt else None

    with serve(behave) as server:
        assert main(arguments(prompts, server.base_url, tmp_path / "out", *QUICK)) == 0
    assert [row["teacher_response"] for row in rows(tmp_path / "out/train.jsonl")] == [
        answer_to(f"Question number {i}?") for i in range(4)
    ]
    assert server.attempts() == Counter({f"Question number {i}?": 1 + (i == 1) for i in range(4)})
    assert "4 answered, 0 failed" in capsys.readouterr().out


REASONS = {
    "drop": "no answer: Server disconnected",
    "slow": "no answer: no whole answer in 0.5 s",
    "429": "HTTP 429: slow down (Retry-After: 0.2)",
    "500": "HTTP 500: oops",
    "malformed": "the answer is not JSON: '{\"choices\": [}'",
    "html": "the answer is not JSON: '<html>busy</html>'",
    "list": "the answer is JSON, but no object: '[1]'",
    "truncated": "no answer: peer closed connection without sending complete message body",
    "truncated stream": "no answer: peer closed connection without sending complete message body",
    "gzip that is none": "no answer: Error -3 while decompressing data",
    "no choices": "the answer has no choices",
    "no message": "the answer has no message",
    "no content": "the answer's message has no content",
    "error with 200": "the answer holds an error: upstream died",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_stays_is_reported_and_asked_again_by_the_next_run(
    fault: str, prompts: Path, tmp_path: Path, capsys
) -> None:
    broken = True

    def behave(prompt: str, attempt: int):
        return FAULTS[fault] if broken and "1" in prompt else None

    with serve(behave) as server:
        argv = arguments(prompts, server.base_url, tmp_path / "out", *QUICK)
        assert main(argv) == 1
        out = capsys.readouterr().out
        assert "3 answered, 1 failed, 0 not asked" in out
        assert f"failed (1): {REASONS[fault]}" in out
        assert server.attempts()["Question number 1?"] == 3  # max_retries = 2
        assert len(rows(tmp_path / "out/train.jsonl")) == 3
        server.seen.clear()
        broken = False
        assert main(argv) == 0
        assert server.seen == ["Question number 1?"]
    assert len(rows(tmp_path / "out/train.jsonl")) == 4


def test_retry_after_is_obeyed(prompts: Path, tmp_path: Path) -> None:
    times: list[float] = []

    def behave(prompt: str, attempt: int):
        times.append(time.monotonic())
        return (lambda h: h.reply(429, {}, Retry_After="1.2")) if attempt == 0 else None

    with serve(behave) as server:
        assert main(arguments(prompts, server.base_url, tmp_path / "out", "--prompts.rows", "1")) == 0
    assert 1.2 <= times[1] - times[0] < 5


@pytest.mark.parametrize(("status", "text"), [(401, "environment variable OPENAI_API_KEY"), (404, "no such model")])
def test_what_is_wrong_for_all_stops_at_once(status: int, text: str, prompts: Path, tmp_path: Path, capsys) -> None:
    with serve(lambda *_: lambda h: h.reply(status, {"error": {"message": "no such model"}})) as server:
        argv = arguments(prompts, server.base_url, tmp_path / "out", "--endpoint.concurrency", "1")
        assert main(argv) == 1
    assert len(server.seen) == 1
    out = capsys.readouterr().out
    assert "1 failed, 3 not asked" in out and text in out


def test_failures_in_a_row_end_the_run(prompts: Path, tmp_path: Path, capsys) -> None:
    with serve(lambda *_: Handler.drop) as server:
        more = ("--endpoint.give_up_after", "2", "--endpoint.concurrency", "1", "--endpoint.max_retries", "0")
        assert main(arguments(prompts, server.base_url, tmp_path / "out", *more)) == 1
    assert len(server.seen) == 2
    assert "stopped: 2 requests in a row failed" in capsys.readouterr().out


def test_a_server_that_is_not_there(prompts: Path, tmp_path: Path, capsys) -> None:
    more = ("--endpoint.max_retries", "0")
    assert main(arguments(prompts, "http://127.0.0.1:9/v1", tmp_path / "out", *more)) == 1
    assert "failed (4): no answer: All connection attempts failed" in capsys.readouterr().out


def test_refusals_and_cut_responses_are_marked_and_left_out(prompts: Path, tmp_path: Path) -> None:
    odd = {
        "0": lambda h: h.reply(200, completion(None, refusal="I cannot help with that.")),
        "1": lambda h: h.reply(200, completion("A long ans", "length")),
        "2": lambda h: h.reply(400, {"error": {"code": "content_filter", "message": "filtered"}}),
    }
    with serve(lambda prompt, _: odd.get(prompt[-2])) as server:
        argv = arguments(prompts, server.base_url, tmp_path / "out")
        assert main(argv) == 0
        assert [row["prompt"] for row in rows(tmp_path / "out/train.jsonl")] == ["Question number 3?"]
        assert main([*argv, "--output.keep_cut", "true", "--output.keep_refused", "true"]) == 0
        assert len(server.seen) == 4
    kept = [row["teacher_response"] for row in rows(tmp_path / "out/train.jsonl")]
    assert kept == ["I cannot help with that.", "A long ans", answer_to("Question number 3?")]
    stored = {row["messages"][0]["content"][-2]: row["reply"] for row in rows(tmp_path / "out/replies.jsonl")}
    assert [stored[i]["finish_reason"] for i in "0123"] == ["stop", "length", "content_filter", "stop"]
    assert stored["1"]["usage"]["completion_tokens"] == 5
    card = (tmp_path / "out/README.md").read_text()
    assert "| refused | 2 |" in card and "| cut | 1 |" in card


@pytest.mark.parametrize(
    ("budget", "count"),
    [
        (("--budget.requests", "2"), 2),
        # 10 + 5 tokens are counted for each; the next may need its estimated prompt (15) and 20 more.
        (("--budget.tokens", "70"), 3),
        (("--budget.money", "0.00007", "--endpoint.price_input", "1", "--endpoint.price_output", "1"), 3),
    ],
)
def test_a_budget_stops_it_and_holds_for_all_runs_together(
    budget: tuple[str, ...], count: int, prompts: Path, tmp_path: Path, capsys
) -> None:
    with serve() as server:
        argv = arguments(prompts, server.base_url, tmp_path / "out", "--sampling.max_tokens", "20")
        for _ in range(2):
            assert main([*argv, *budget]) == 1
            assert len(server.seen) == count
            out = capsys.readouterr().out
            assert f"{count} answered, 0 failed, {4 - count} not asked" in out
            assert "stopped: the budget is spent: budget." in out
        assert main(argv) == 0
        assert len(server.seen) == 4


def test_a_server_that_counts_no_tokens_spends_the_budget_all_the_same(tmp_path: Path, capsys) -> None:
    """As one does that says nothing of tokens."""
    prompts, asked = prompts_file(tmp_path / "prompts.txt", 12), []
    for usage in (None, {"prompt_tokens": 0, "completion_tokens": 0}):
        body = completion("An answer of some words. " * 20) | {"usage": usage}
        with serve(lambda *_, body=body: lambda h: h.reply(200, body)) as server:
            argv = arguments(prompts, server.base_url, tmp_path / f"out-{len(asked)}", "--sampling.max_tokens", "20")
            assert main([*argv, "--budget.tokens", "700", "--endpoint.concurrency", "1"]) == 1
            asked.append(len(server.seen))
    assert asked[0] == asked[1] < 12
    assert f"odd ({asked[1]}): usage counts fewer tokens than so much text can have: estimated" in (
        capsys.readouterr().out
    )


def test_unusable_answers_count_against_the_budget(prompts: Path, tmp_path: Path) -> None:
    with serve(lambda *_: lambda h: h.reply(200, completion(None))) as server:
        assert main(arguments(prompts, server.base_url, tmp_path / "out", "--budget.requests", "3")) == 1
        assert len(server.seen) == 3
        assert main(arguments(prompts, server.base_url, tmp_path / "out", "--budget.requests", "3")) == 1
        assert len(server.seen) == 3


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_requests_in_flight_than_asked_for(concurrency: int, tmp_path: Path) -> None:
    prompts = prompts_file(tmp_path / "prompts.txt", 12)
    with serve(delay=0.03) as server:
        more = ("--endpoint.concurrency", str(concurrency))
        assert main(arguments(prompts, server.base_url, tmp_path / "out", *more)) == 0
    assert server.most_in_flight == concurrency


def test_killed_twice_and_resumed_nothing_is_asked_twice_and_the_file_is_the_same(tmp_path: Path) -> None:
    count, concurrency = 40, 4
    prompts = prompts_file(tmp_path / "prompts.txt", count)
    with serve(delay=0.01) as server:
        whole = arguments(prompts, server.base_url, tmp_path / "whole", "--endpoint.concurrency", str(concurrency))
        assert main(whole) == 0
    with serve(delay=0.05) as server:
        argv = arguments(prompts, server.base_url, tmp_path / "out", "--endpoint.concurrency", str(concurrency))
        on_disk: set[str] = set()
        for target in (10, 25):
            server.seen.clear()
            process = start(argv)
            while len(server.seen) < target - len(on_disk) and process.poll() is None:
                time.sleep(0.005)
            process.kill()
            process.communicate()
            time.sleep(0.2)  # what the server has received is in its log
            assert process.returncode == -signal.SIGKILL
            assert not on_disk & set(server.seen)
            before, on_disk = on_disk, answered(tmp_path / "out")
            # Asked, but without an answer on disk: those in flight, and no others.
            assert len(set(server.seen) - on_disk) <= concurrency
            assert before < on_disk < {f"Question number {i}?" for i in range(count)}
        server.seen.clear()
        assert main(argv) == 0
        assert sorted(server.seen) == sorted({f"Question number {i}?" for i in range(count)} - on_disk)
        server.seen.clear()
        assert main(argv) == 0
        assert server.seen == []
    assert (tmp_path / "out/train.jsonl").read_bytes() == (tmp_path / "whole/train.jsonl").read_bytes()


def test_sigterm_waits_for_the_requests_in_flight(tmp_path: Path) -> None:
    prompts = prompts_file(tmp_path / "prompts.txt", 40)
    with serve(delay=0.4) as server:
        process = start(arguments(prompts, server.base_url, tmp_path / "out", "--endpoint.concurrency", "4"))
        while len(server.seen) < 4 and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, out
    assert len(server.seen) == 4 and answered(tmp_path / "out") == set(server.answered) == set(server.seen)
    assert "4 answered, 0 failed, 36 not asked" in out and "stopped: SIGTERM" in out


@pytest.mark.parametrize("cut", [1, 2, 40, 200])
def test_a_torn_last_line_is_repaired_and_said(cut: int, prompts: Path, tmp_path: Path, capsys) -> None:
    with serve() as server:
        argv = arguments(prompts, server.base_url, tmp_path / "out", "--endpoint.concurrency", "1")
        assert main(argv) == 0
        replies, train = tmp_path / "out/replies.jsonl", (tmp_path / "out/train.jsonl").read_bytes()
        replies.write_bytes(replies.read_bytes()[:-cut])
        server.seen.clear()
        assert main(argv) == 0
        assert server.seen == ["Question number 3?"]
    assert (tmp_path / "out/train.jsonl").read_bytes() == train
    assert "was only half written" in capsys.readouterr().err
    assert len(rows(replies)) == 4


def test_a_broken_line_in_the_middle_is_refused_with_its_number(prompts: Path, tmp_path: Path) -> None:
    with serve() as server:
        argv = arguments(prompts, server.base_url, tmp_path / "out")
        assert main(argv) == 0
        replies = tmp_path / "out/replies.jsonl"
        lines = replies.read_text().splitlines(keepends=True)
        replies.write_text(lines[0] + lines[1][:50] + "\n" + lines[2])
        with pytest.raises(UserError, match=r"replies\.jsonl:2 is no line of replies"):
            main(argv)
        assert len(server.seen) == 4


def test_a_store_in_use_is_refused(prompts: Path, tmp_path: Path) -> None:
    with (
        ReplyStore(tmp_path / "out/replies.jsonl"),
        pytest.raises(UserError, match=rf"replies.jsonl is in use by process {os.getpid()} on "),
    ):
        main(arguments(prompts, "http://127.0.0.1:9/v1", tmp_path / "out"))


def test_a_full_disk_keeps_what_was_stored(prompts: Path, tmp_path: Path) -> None:
    with serve() as server:
        argv = arguments(prompts, server.base_url, tmp_path / "out", "--endpoint.concurrency", "1")
        limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); import signal; " \
                  "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "  # fmt: skip
        process = start(argv, prefix=limited)
        out, _ = process.communicate(timeout=60)
        assert "replies.jsonl cannot be written: File too large" in out
        kept = answered(tmp_path / "out")
        assert 0 < len(kept) < 4
        server.seen.clear()
        assert main(argv) == 0
        assert len(server.seen) == 4 - len(kept)


def test_the_key_is_sent_but_never_written_or_printed(prompts: Path, tmp_path: Path) -> None:
    def behave(prompt: str, attempt: int):
        echo = {"error": {"message": f"key {SECRET} has no credit"}}
        return {"0": lambda h: h.reply(403, echo), "1": lambda h: h.reply(200, echo)}.get(prompt[-2])

    with serve(behave) as server:
        more = ("--endpoint.api_key_variable", "TEACHER_KEY", "--endpoint.max_retries", "1")
        process = start(arguments(prompts, server.base_url, tmp_path / "out", *more), TEACHER_KEY=SECRET)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "key *** has no credit" in out
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {SECRET}"}
    assert SECRET not in out and SECRET not in json.dumps(server.bodies)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"replies.jsonl", "train.jsonl", "README.md", "config.toml"}
    assert all(SECRET not in path.read_text() for path in files)
