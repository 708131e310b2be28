"""Win / Tie / Loss by a judge: a win counts where both orders agree, and bias is reported."""

from __future__ import annotations

from pathlib import Path

import pytest

from gadcore.errors import UserError
from gadcore.evaluate.judge_command import compare_main
from gadcore.evaluate.pairwise import LOSS, TIE, WIN, one_hot, outcome, parse_choice, summarise
from tests.support import judging
from tests.support.openai_server import serve


@pytest.mark.parametrize(
    ("reply", "choice"),
    [
        ("A", "A"),
        (" b.\nBecause A is worse.", "B"),
        ("**TIE**", "TIE"),
        ("[[B]]", "B"),
        ("Verdict: A", "A"),
        ("Answer B is better", None),
        ("Answer B", "B"),
        ("A tie", None),
        ("A or B", None),
        ("Both are good.\nA", None),
        ("apple", None),
        ("", None),
    ],
)
def test_choices_are_read_from_the_first_line_or_not_at_all(reply: str, choice: str | None) -> None:
    assert parse_choice(reply) == choice


def test_only_what_both_orders_say_is_a_win_or_a_loss() -> None:
    outcomes = {(x, y): outcome((x, y)) for x in ("A", "B", "TIE") for y in ("A", "B", "TIE")}
    assert {key for key, value in outcomes.items() if value == WIN} == {("A", "B")}
    assert {key for key, value in outcomes.items() if value == LOSS} == {("B", "A")}
    assert sum(value == TIE for value in outcomes.values()) == 7


def longer(a: str, b: str) -> str:
    return "TIE" if len(a) == len(b) else "A" if len(a) > len(b) else "B"


def test_wins_ties_and_losses_of_a_judge_without_bias(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = judging.folder(
        tmp_path, gad=judging.rows(["long" * 9, "same", "long" * 9, "s"]), seqkd=judging.rows(["s", "same", "s", "ss"])
    )
    with serve(judging.judged_by(longer)) as server:
        assert (
            compare_main(judging.arguments("compare", out, server.base_url, compare__a="gad", compare__b="seqkd")) == 0
        )
        assert len(server.seen) == 7  # a prompt whose two answers are the same text reads alike in both orders
    result = judging.result(out, "compare/judge/gad/seqkd")
    assert [result[name] for name in ("win", "tie", "loss", "net", "n")] == [0.5, 0.25, 0.25, 25, 4]
    assert (result["consistency"], result["position_bias"]) == (1, 0)
    assert [prompt["outcome"] for prompt in result["prompts"]] == ["win", "tie", "win", "loss"]
    assert "held gad against seqkd: win 50 %, tie 25 %, loss 25 %; net +25.0 points [" in capsys.readouterr().out


def test_a_judge_that_takes_the_first_one_finds_only_ties(tmp_path: Path) -> None:
    out = judging.folder(tmp_path, gad=judging.rows(["a", "b", "c"]), seqkd=judging.rows(["d", "e", "f"]))
    with serve(judging.judged_by(lambda a, b: "A")) as server:
        assert (
            compare_main(judging.arguments("compare", out, server.base_url, compare__a="gad", compare__b="seqkd")) == 0
        )
    result = judging.result(out, "compare/judge/gad/seqkd")
    assert (result["tie"], result["consistency"], result["position_bias"]) == (1, 0, 1)


def test_no_readable_verdict_gives_no_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = judging.folder(tmp_path, gad=judging.rows(["a"]), seqkd=judging.rows(["d"]))
    with serve(judging.judged_by(lambda a, b: "perhaps")) as server:
        assert (
            compare_main(judging.arguments("compare", out, server.base_url, compare__a="gad", compare__b="seqkd")) == 1
        )
    result = judging.result(out, "compare/judge/gad/seqkd")
    assert (result["n"], result["unparsable"]) == (0, 2) and "win" not in result
    assert "no prompt could be judged" in capsys.readouterr().out


def test_every_pair_of_models_has_a_file_of_its_own(tmp_path: Path) -> None:
    models = {name: judging.rows([name]) for name in ("x-y", "z", "x", "y-z")}
    out = judging.folder(tmp_path, **models)
    with serve(judging.judged_by(lambda a, b: "A")) as server:
        for a, b in (("x-y", "z"), ("x", "y-z")):
            argv = judging.arguments("compare", out, server.base_url, compare__a=a, compare__b=b)
            assert compare_main(argv) == 0
            found = judging.result(out, f"compare/judge/{a}/{b}")
            assert (found["a"], found["b"]) == (a, b)


@pytest.mark.parametrize(
    ("a", "b", "problem"),
    [
        ("gad", "gad", "compared with itself"),
        ("gad", "other", "line 1 of .*other.jsonl answers another prompt"),
        ("gad", "short", "gad.jsonl has 2 rows, .*short.jsonl 1"),
        ("gad", "none", "has no none: it holds gad, other, short"),
        ("gad", "", "two models are needed"),
    ],
)
def test_what_cannot_be_compared(tmp_path: Path, a: str, b: str, problem: str) -> None:
    other = judging.rows(["x", "y", "z"])[1:]
    out = judging.folder(tmp_path, gad=judging.rows(["a", "b"]), other=other, short=judging.rows(["a"]))
    with pytest.raises(UserError, match=problem):
        compare_main([*judging.arguments("compare", out, "http://127.0.0.1:1/v1"), "--compare.a", a, "--compare.b", b])


def test_the_interval_of_net_is_that_of_its_mean() -> None:
    result = summarise([one_hot(WIN)] * 60 + [one_hot(TIE)] * 20 + [one_hot(LOSS)] * 20)
    assert result["net"] == pytest.approx(40)
    # The standard error of a mean of values with this spread: 8 points, so 40 -+ 16.
    assert result["interval"] == [pytest.approx(24, abs=3), pytest.approx(56, abs=3)]
