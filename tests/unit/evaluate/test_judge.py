"""The judge's score: both orders, the formula, position bias, what cannot be read, and going on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gadcore.errors import UserError
from gadcore.evaluate.judge import load_prompts, parse_ratings, share_of_total
from gadcore.evaluate.judge_command import judge_main
from gadcore.evaluate.judge_rows import conversation
from gadcore.evaluate.responses import ResponseRow
from tests.support import judging
from tests.support.openai_server import serve

GOOD = {"good": 8, "fair": 5, "reference": 6}


def fair(a: str, b: str) -> str:
    return f"{GOOD[a.split()[0]]} {GOOD[b.split()[0]]}\nBecause."


@pytest.mark.parametrize(
    ("reply", "ratings"),
    [
        ("7 9", (7, 9)),
        ("\n  8.5, 6 \nBoth are fine, 10 out of 10.", (8.5, 6)),
        ("**A: 8/10, B: 6/10**", (8, 6)),
        ("[[3]] [[10]]", (3, 10)),
        ("<think>\nA is 2, B is 3\n</think>\n\n4 7", (4, 7)),
        ("7", None),
        ("7 8 9", None),
        ("0 5", None),
        ("11 5", None),
        ("-3 5", None),
        ("The answers are good.\n7 8", None),
        ("", None),
    ],
)
def test_ratings_are_read_from_the_first_line_or_not_at_all(reply: str, ratings: tuple[float, float] | None) -> None:
    assert parse_ratings(reply) == ratings


def test_the_score_of_a_judge_without_bias(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = judging.folder(tmp_path, gad=judging.rows(["good answer", "fair answer", "good one"]))
    with serve(judging.judged_by(fair)) as server:
        assert judge_main(judging.arguments("judge", out, server.base_url)) == 0
        # Every prompt in both orders, at temperature 0.
        asked = [body["messages"][0]["content"] for body in server.bodies]
        assert len(set(asked)) == len(asked) == 6
        assert all(body["temperature"] == 0 for body in server.bodies)
        for i, response in enumerate(["good answer", "fair answer", "good one"]):
            shown = [prompt for prompt in asked if f"<request>\nQuestion {i}?\n</request>" in prompt]
            firsts = {prompt.split("<answer A>\n")[1].split("\n")[0] for prompt in shown}
            assert firsts == {response, f"reference {i}"}
    result = judging.result(out, "judge/judge/gad")
    assert result["score"] == pytest.approx(100 * 21 / (21 + 18))
    assert result["interval"][0] < result["score"] < result["interval"][1]
    assert (result["n"], result["unparsable"], result["unanswered"]) == (3, 0, 0)
    assert (result["position_bias"], result["consistency"]) == (0, 1)
    assert result["prompts"][1] == {"row": 1, "response": [5, 5], "reference": [6, 6]}
    assert "held gad: score 53.8 [" in capsys.readouterr().out


def test_position_bias_is_detected_and_cancels(tmp_path: Path) -> None:
    out = judging.folder(tmp_path, gad=judging.rows(["any", "thing", "at all"]))
    with serve(judging.judged_by(lambda a, b: "9 5")) as server:
        assert judge_main(judging.arguments("judge", out, server.base_url)) == 0
    result = judging.result(out, "judge/judge/gad")
    assert result["position_bias"] == 4
    assert result["consistency"] == 0
    assert (result["score"], result["interval"]) == (50, [50, 50])


def test_what_cannot_be_read_is_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = judging.folder(tmp_path, gad=judging.rows(["good a", "odd b", "good c"]))

    def verdict(a: str, b: str) -> str:
        return "I would rather not." if a.startswith("odd") else "8 8" if b.startswith("odd") else fair(a, b)

    with serve(judging.judged_by(verdict)) as server:
        assert judge_main(judging.arguments("judge", out, server.base_url)) == 0
    result = judging.result(out, "judge/judge/gad")
    assert (result["n"], result["unparsable"]) == (2, 1)
    assert result["unparsable_replies"] == [
        {"row": 1, "order": 0, "outcome": "answered", "reply": "I would rather not."}
    ]
    # The reply to the other order does not count alone.
    assert [prompt["row"] for prompt in result["prompts"]] == [0, 2]
    assert "1 replies could not be read" in capsys.readouterr().out


def test_no_readable_reply_gives_no_score_and_all_are_asked_anew(tmp_path: Path, capsys) -> None:
    out = judging.folder(tmp_path, gad=judging.rows(["a", "b"]))
    said = "?"
    with serve(judging.judged_by(lambda a, b: said)) as server:
        argv = judging.arguments("judge", out, server.base_url)
        assert judge_main(argv) == 1
        result = judging.result(out, "judge/judge/gad")
        assert (result["score"], result["interval"], result["n"], result["unparsable"]) == (None, None, 0, 4)
        assert "the same command asks for them anew" in capsys.readouterr().out
        said = "6 6"
        assert judge_main(argv) == 0
        assert judge_main(argv) == 0 and len(server.seen) == 8
    assert judging.result(out, "judge/judge/gad")["n"] == 2


def test_it_goes_on_without_asking_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = judging.folder(tmp_path, gad=judging.rows([f"good {i}" for i in range(4)]))
    with serve(judging.judged_by(fair)) as server:
        argv = judging.arguments("judge", out, server.base_url)
        assert judge_main([*argv, "--budget.requests", "3"]) == 1
        part = judging.result(out, "judge/judge/gad")
        assert (part["n"], part["unanswered"]) == (1, 5)
        assert {request["reason"] for request in part["unanswered_requests"]} == {part["stopped"]}
        assert "stopped: the budget is spent" in capsys.readouterr().out
        kept = (out / "judgements.jsonl").read_bytes()
        assert judge_main(argv) == 0
        assert len(server.seen) == 8 and set(server.attempts().values()) == {1}
        assert judge_main(argv) == 0
        assert len(server.seen) == 8
    assert judging.result(out, "judge/judge/gad")["n"] == 4
    stored = (out / "judgements.jsonl").read_bytes()
    assert stored.startswith(kept) and stored.count(b"\n") == 8


def test_a_request_that_failed_is_named_and_asked_again(tmp_path: Path) -> None:
    out = judging.folder(tmp_path, gad=judging.rows(["good 0", "good 1"]))
    usual = judging.judged_by(fair)

    def once_broken(prompt: str, attempt: int):
        broken = "<answer A>\ngood 1" in prompt and attempt == 0
        return (lambda handler: handler.reply(400, b"{}")) if broken else usual(prompt, attempt)

    with serve(once_broken) as server:
        argv = judging.arguments("judge", out, server.base_url)
        assert judge_main(argv) == 1
        (failed,) = judging.result(out, "judge/judge/gad")["unanswered_requests"]
        assert (failed["row"], failed["order"]) == (1, 0) and "400" in failed["reason"]
        assert judge_main(argv) == 0
        assert len(server.seen) == 5
    assert judging.result(out, "judge/judge/gad")["n"] == 2


def test_sets_models_and_rows_are_chosen_by_name(tmp_path: Path) -> None:
    out = judging.folder(tmp_path, gad=judging.rows(["good", "good"]), seqkd=judging.rows(["fair", "fair"]))
    with serve(judging.judged_by(fair)) as server:
        more = {"judge__models": '["seqkd"]', "judge__rows": 1}
        assert judge_main(judging.arguments("judge", out, server.base_url, **more)) == 0
        assert len(server.seen) == 2
    assert judging.result(out, "judge/judge/seqkd")["n"] == 1
    assert not (out / "held/judge/judge/gad.json").exists()
    with pytest.raises(UserError, match="has no gda: it holds gad, seqkd"):
        judge_main(judging.arguments("judge", out, "http://127.0.0.1:1/v1", judge__models='["gda"]'))


def test_every_judge_has_figures_of_its_own(tmp_path: Path) -> None:
    out = judging.folder(tmp_path, gad=judging.rows(["good"]))
    names = ("judge", "org/judge", "org%2Fjudge", "..", "j" * 300, "j" * 299)
    with serve(judging.judged_by(fair)) as server:
        for name in names:
            assert judge_main(judging.arguments("judge", out, server.base_url, endpoint__model=name)) == 0
    files = list((out / "held/judge").glob("*/gad.json"))
    assert sorted(json.loads(path.read_text())["judge"] for path in files) == sorted(names)
    assert [path.name for path in out.rglob("*.json")] == ["gad.json"] * len(names)


def test_the_same_judge_elsewhere_is_told(tmp_path: Path, capsys) -> None:
    out = judging.folder(tmp_path, gad=judging.rows(["good"]))
    with serve(judging.judged_by(fair)) as one, serve(judging.judged_by(fair)) as two:
        for server in (one, two):
            assert judge_main(judging.arguments("judge", out, server.base_url)) == 0
        assert len(one.seen) == len(two.seen) == 2
    assert f"held the figures of a judge of the same name at {one.base_url}" in capsys.readouterr().out


def test_a_file_of_prompts_of_ones_own(tmp_path: Path) -> None:
    own = tmp_path / "own.md"
    own.write_text("# score\nCosts $$5.\n$prompt|$a|$b\n# compare\n$prompt $a $b\n")
    prompts = load_prompts(own)
    # What stands in a text is never taken for a place.
    assert prompts["score"].substitute(prompt="$a {b}", a="$b", b="x") == "Costs $5.\n$a {b}|$b|x"
    for text, problem in (
        ("# score\n$prompt $a $b\n", "no section # compare"),
        ("# score\n$prompt $a\n# compare\n$prompt $a $b\n", "section # score"),
        ("# score\n$prompt $a $b $5\n# compare\n$prompt $a $b\n", "section # score"),
    ):
        own.write_text(text)
        with pytest.raises(UserError, match=problem):
            load_prompts(own)


def test_several_turns_are_shown_by_role() -> None:
    messages = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"},
                {"role": "user", "content": "Why?"})  # fmt: skip
    assert (
        conversation(ResponseRow("Why?", messages, "", "", True, "", True, 0))
        == "user: Hi\n\nassistant: Yes?\n\nuser: Why?"
    )


def test_the_interval_covers_the_score_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    true, hits, trials = 100 * 5 / 11, 0, 200
    for trial in range(trials):
        part, rest = rng.normal(5, 1.5, 40), rng.normal(6, 1.5, 40)
        _, (low, high) = share_of_total(part, rest, seed=trial, resamples=300)
        hits += low <= true <= high
    assert 0.88 <= hits / trials <= 0.99


def test_a_budget_of_money_needs_prices(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="budget.money needs endpoint.price_input"):
        judge_main(judging.arguments("judge", tmp_path, "http://127.0.0.1:1/v1", budget__money=1.0))


def test_no_folder_and_no_responses(tmp_path: Path) -> None:
    for folder, problem in ((tmp_path / "none", "is no folder"), (tmp_path, "holds no such responses")):
        with pytest.raises(UserError, match=problem):
            judge_main(judging.arguments("judge", folder, "http://127.0.0.1:1/v1"))


def test_replies_are_kept_as_they_came(tmp_path: Path) -> None:
    out = judging.folder(tmp_path, gad=judging.rows(["good"]))
    with serve(judging.judged_by(fair)) as server:
        judge_main(judging.arguments("judge", out, server.base_url))
    stored = [json.loads(line) for line in (out / "judgements.jsonl").read_text().splitlines()]
    assert {row["reply"]["text"] for row in stored} == {"8 6\nBecause.", "6 8\nBecause."}
