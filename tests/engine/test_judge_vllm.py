"""The judge's route end to end with vLLM's own server. The judge is a tiny random model, so its verdicts are noise:
what is asserted is that every reply is asked for once, kept, and counted as read or as unreadable."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gadcore.evaluate.judge_command import compare_main, judge_main
from tests.support import judging
from tests.support.vllm_server import VllmServer

ROWS = 3
# The tiny tokenizer counts letters, and the context is short: the questions have to be, too.
QUESTIONS = "# score\nRate $a and $b: $prompt\n\n# compare\nA $a, B $b, TIE: $prompt\n"


@pytest.mark.timeout(400)
def test_every_reply_is_kept_and_counted(server: VllmServer, tmp_path: Path) -> None:
    questions = tmp_path / "questions.md"
    questions.write_text(QUESTIONS)
    out = judging.folder(
        tmp_path / "eval", gad=judging.rows([f"a{i}" for i in range(ROWS)]), seqkd=judging.rows(list("xyz"))
    )
    more = {"endpoint__model": "tiny", "sampling__max_tokens": 16}
    argv = judging.arguments("judge", out, server.base_url, judge__prompts=questions, judge__models='["gad"]', **more)
    before = server.received()
    code = judge_main(argv)
    assert server.received() - before == 2 * ROWS
    result = judging.result(out, "judge/tiny/gad")
    assert result["unanswered"] == 0
    assert 2 * ROWS - result["unparsable"] >= 2 * result["n"]
    assert (result["score"] is None) == (result["n"] == 0)
    assert code == (0 if result["n"] else 1)
    judge_main(argv)
    # What could not be read is asked for anew.
    again = 2 * ROWS + result["unparsable"]
    assert server.received() - before == again

    argv = judging.arguments("compare", out, server.base_url, compare__prompts=questions, compare__a="gad",
                             compare__b="seqkd", **more)  # fmt: skip
    compare_main(argv)
    assert server.received() - before == again + 2 * ROWS
    stored = [json.loads(line) for line in (out / "judgements.jsonl").read_text().splitlines()]
    assert len({row["key"] for row in stored}) == 4 * ROWS
    assert all(row["reply"]["model"] == "tiny" and row["parameters"]["temperature"] == 0 for row in stored)
    read = judging.result(out, "compare/tiny/gad/seqkd")
    assert {row["reply"] for row in read["unparsable_replies"]} <= {row["reply"]["text"] for row in stored}
