"""`collect` against vLLM's own OpenAI server: killed and resumed, by the server's log nothing is asked twice."""

from __future__ import annotations

import signal
import time

import pytest

from gadcore.teacher.command import main
from tests.support.collecting import answered, arguments, prompts_file, rows, start
from tests.support.vllm_server import VllmServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PROMPTS, CONCURRENCY = 24, 3


def argv_for(server: VllmServer, folder, out: str) -> list[str]:
    prompts = prompts_file(folder / "prompts.txt", PROMPTS)
    more = {
        "endpoint.model": "tiny",
        "endpoint.concurrency": CONCURRENCY,
        "sampling.temperature": 0,
        "sampling.max_tokens": 64,
        # A random model hardly ever ends by itself.
        "output.keep_cut": "true",
    }
    return [
        *arguments(prompts, server.base_url, folder / out),
        *(part for name, value in more.items() for part in (f"--{name}", str(value))),
    ]


def test_killed_and_resumed_against_vllm(server: VllmServer, tmp_path, capsys) -> None:
    before = len(server.accesses())
    assert main(argv_for(server, tmp_path, "whole")) == 0
    assert server.accesses()[before:] == ["200"] * PROMPTS
    whole = rows(tmp_path / "whole/train.jsonl")
    assert len(whole) == PROMPTS and len({row["teacher_response"] for row in whole}) > 1
    reply = rows(tmp_path / "whole/replies.jsonl")[0]["reply"]
    assert reply["finish_reason"] in ("stop", "length") and reply["usage"]["completion_tokens"] > 0
    assert reply["model"] == "tiny"

    asked_before = server.received()
    argv = argv_for(server, tmp_path, "out")
    process = start(argv)
    while process.poll() is None and not (tmp_path / "out/replies.jsonl").exists():
        time.sleep(0.01)
    while process.poll() is None and len(answered(tmp_path / "out")) < PROMPTS // 3:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    kept = answered(tmp_path / "out")
    assert 0 < len(kept) < PROMPTS
    time.sleep(2)  # what the server has received is in its log
    asked_by_the_killed = server.received() - asked_before
    assert len(kept) <= asked_by_the_killed <= len(kept) + CONCURRENCY

    assert main(argv) == 0
    # Asked again: those that were in flight, and never one that was answered.
    assert server.received() - asked_before - asked_by_the_killed == PROMPTS - len(kept)
    assert (tmp_path / "out/train.jsonl").read_bytes() == (tmp_path / "whole/train.jsonl").read_bytes()
    asked = server.received()
    assert main(argv) == 0 and server.received() == asked
    assert f"{PROMPTS} of the replies were there before" in capsys.readouterr().out


def test_a_prompt_that_is_too_long_for_vllm_is_reported_and_the_rest_is_kept(server, tmp_path, capsys) -> None:
    argv = argv_for(server, tmp_path, "out")
    with (tmp_path / "prompts.txt").open("a") as file:
        file.write("long " * 400 + "\n")
    assert main(argv) == 1
    assert len(rows(tmp_path / "out/train.jsonl")) == PROMPTS
    out = capsys.readouterr().out
    assert "1 failed, 0 not asked" in out and "failed (1): HTTP 400:" in out and "maximum context length" in out


def test_a_model_that_vllm_does_not_serve_stops_at_once(server, tmp_path, capsys) -> None:
    assert main([*argv_for(server, tmp_path, "out"), "--endpoint.model", "large", "--endpoint.concurrency", "1"]) == 1
    out = capsys.readouterr().out
    assert f"1 failed, {PROMPTS - 1} not asked" in out and "The model `large` does not exist" in out
