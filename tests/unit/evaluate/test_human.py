"""The blind sheet and its tally, without a browser (tests/runs/test_human_sheet.py has one)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from gadcore.errors import UserError
from gadcore.evaluate.human import make_sheet
from gadcore.evaluate.human_command import sheet_main, tally_main
from gadcore.evaluate.human_tally import agreement, tally
from gadcore.evaluate.pairwise import LOSS, TIE, WIN
from tests.support import judging

HOSTILE = "</script><script>alert(1)</script><!-- {{ 7 * 7 }} \u2028 &amp; ' \""


def sheet_of(count: int = 40, seed: int = 0, prompts: int | None = None):
    a = judging.rows([f"from one {i}" for i in range(count)])
    b = judging.rows([f"from other {i}" for i in range(count)])
    return make_sheet(("gad", a), ("seqkd", b), set_name="held", title="Better?", seed=seed, prompts=prompts)


def content_of(page: str) -> dict:
    return json.loads(re.search(r'id="sheet">(.*?)</script>', page)[1])


def answers(key: dict, choices: dict[int, int], rater: str = "Ada") -> dict:
    """An export in which the rows of `choices` have these outcomes for model a."""
    rows = []
    for pair, hidden in key["pairs"].items():
        if hidden["row"] in choices:
            a_side, b_side = ("left", "right") if hidden["left"] == "a" else ("right", "left")
            choice = {WIN: a_side, LOSS: b_side, TIE: "tie"}[choices[hidden["row"]]]
            rows.append({"pair": pair, "choice": choice, "seconds": 3.0})
    return {"sheet": key["sheet"], "rater": rater, "pairs": len(key["pairs"]), "answers": rows}


def write(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


def test_the_same_arguments_give_the_same_sheet() -> None:
    assert sheet_of() == sheet_of()
    assert sheet_of(seed=1).key["pairs"] != sheet_of().key["pairs"]


def test_the_key_tells_which_text_is_whose() -> None:
    sheet = sheet_of()
    pairs = content_of(sheet.page)["pairs"]
    assert sorted(hidden["row"] for hidden in sheet.key["pairs"].values()) == list(range(40))
    for pair in pairs:
        hidden = sheet.key["pairs"][pair["id"]]
        assert pair["messages"][0]["content"] == f"Question {hidden['row']}?"
        sides = (pair["left"], pair["right"]) if hidden["left"] == "a" else (pair["right"], pair["left"])
        assert sides == (f"from one {hidden['row']}", f"from other {hidden['row']}")


def test_sides_and_order_are_mixed_and_the_page_gives_nothing_away() -> None:
    sheet = sheet_of()
    lefts = [hidden["left"] for hidden in sheet.key["pairs"].values()]
    assert 10 <= lefts.count("a") <= 30
    rows = [hidden["row"] for hidden in sheet.key["pairs"].values()]
    assert rows != sorted(rows)
    assert "gad" not in json.dumps(content_of(sheet.page)) and "seqkd" not in sheet.page
    assert set(content_of(sheet.page)["pairs"][0]) == {"id", "messages", "left", "right"}


def test_some_prompts_are_drawn() -> None:
    assert len(sheet_of(prompts=7).key["pairs"]) == 7
    assert len(sheet_of(prompts=70).key["pairs"]) == 40


def test_hostile_text_stays_text_and_the_page_stands_alone() -> None:
    rows = judging.rows([HOSTILE])
    page = make_sheet(("a", rows), ("b", rows), set_name="s", title=HOSTILE, seed=0).page
    assert page.count("<script") == 2 and page.count("</script>") == 2
    assert content_of(page)["pairs"][0]["left"] == HOSTILE
    assert "default-src 'none'" in page and "script-src 'sha256-" in page
    assert not re.findall(r"https?://|url\(|@import|\ssrc=|<link", page)


def test_wins_ties_and_losses_of_one_rater(tmp_path: Path) -> None:
    key = sheet_of(10).key
    choices = {row: WIN if row < 5 else TIE if row < 7 else LOSS for row in range(9)}
    result = tally(write(tmp_path / "key.json", key), [write(tmp_path / "ada.json", answers(key, choices))])
    (rater,) = result["raters"]
    assert [rater[name] for name in ("rater", "n", "missing")] == ["Ada", 9, 1]
    assert [rater[name] for name in ("win", "tie", "loss", "net")] == pytest.approx([5 / 9, 2 / 9, 2 / 9, 100 / 3])
    assert rater["interval"][0] < rater["net"] < rater["interval"][1]
    assert result["all"]["n"] == 9 and result["unrated"] == 1 and result["agreement"] is None


def test_a_prompt_counts_once_however_many_have_rated_it(tmp_path: Path) -> None:
    key = sheet_of(2).key
    files = [
        write(tmp_path / f"{name}.json", answers(key, choices, name))
        for name, choices in {"x": {0: WIN, 1: LOSS}, "y": {0: WIN}, "z": {0: LOSS}}.items()
    ]
    result = tally(write(tmp_path / "key.json", key), files)
    # Prompt 0: two of three for a. Prompt 1: one, against a.
    assert [result["all"][name] for name in ("win", "tie", "loss")] == pytest.approx([1 / 3, 0, 2 / 3])
    assert [rater["missing"] for rater in result["raters"]] == [0, 1, 1]


def test_cohens_kappa_of_two_raters() -> None:
    # The textbook's table of two raters and 50 items: 20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no; kappa 0.4.
    cells = [(WIN, WIN)] * 20 + [(WIN, LOSS)] * 5 + [(LOSS, WIN)] * 10 + [(LOSS, LOSS)] * 15
    one, two = ({str(i): cell[side] for i, cell in enumerate(cells)} for side in (0, 1))
    result = agreement([one, two | {"only here": TIE}])
    assert result["kappa"] == pytest.approx(0.4)
    assert (result["percent"], result["compared"], result["prompts_by_all"]) == (70, 50, 50)
    assert result["statistic"] == "Cohen"


def test_fleiss_kappa_of_three_raters() -> None:
    # P of the four prompts: 1, 1/3, 0, 1/3, mean 5/12; shares of all: 6, 3, 3 of 12, P_e = 3/8; kappa = 1/15.
    chosen = [(WIN, WIN, WIN), (WIN, WIN, LOSS), (WIN, TIE, LOSS), (TIE, TIE, LOSS)]
    raters = [{str(i): row[side] for i, row in enumerate(chosen)} for side in range(3)]
    result = agreement(raters)
    assert result["kappa"] == pytest.approx((5 / 12 - 54 / 144) / (1 - 54 / 144))
    assert result["percent"] == pytest.approx(100 * 5 / 12) and result["statistic"] == "Fleiss"


def test_agreement_that_cannot_be_told() -> None:
    assert agreement([{"0": WIN}, {"0": WIN}])["kappa"] is None
    assert agreement([{"0": WIN}, {"1": WIN}]) == {"percent": None, "compared": 0, "prompts_by_all": 0,
                                                   "statistic": "Cohen", "kappa": None}  # fmt: skip


def broken(key: dict, **change: object) -> dict:
    return answers(key, {0: WIN}) | change


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda key: broken(key, sheet="0"), "answers sheet 0, the key is of sheet"),
        (lambda key: broken(key, rater=""), 'has no "rater"'),
        (lambda key: broken(key, answers=[]), "holds no answers"),
        (lambda key: broken(key, answers=[{"pair": "x", "choice": "left"}]), "answer 1 .* unknown"),
        (lambda key: broken(key, answers=[{"pair": [*key["pairs"]][0], "choice": "up"}]), "answer 1 .* unknown"),
        (lambda key: broken(key, answers=[{"pair": [*key["pairs"]][0], "choice": "tie"}] * 2), "answer 2 .* twice"),
        (lambda key: broken(key, answers=["left"]), "answer 1 .* unknown"),
        (lambda key: [], "holds no JSON object"),
    ],
)
def test_answers_that_cannot_be_counted(tmp_path: Path, make, problem: str) -> None:
    key = sheet_of(3).key
    with pytest.raises(UserError, match=problem):
        tally(write(tmp_path / "key.json", key), [write(tmp_path / "x.json", make(key))])


def test_two_files_of_one_rater_and_files_that_are_none(tmp_path: Path) -> None:
    key = sheet_of(3).key
    key_path, one = write(tmp_path / "key.json", key), write(tmp_path / "1.json", answers(key, {0: WIN}))
    two = write(tmp_path / "2.json", answers(key, {0: WIN, 1: WIN}))
    with pytest.raises(UserError, match="2.json and .*1.json are both of rater 'Ada'"):
        tally(key_path, [one, two])
    with pytest.raises(UserError, match='1.json has no "a"'):
        tally(one, [two])
    with pytest.raises(UserError, match="none.json does not exist"):
        tally(key_path, [tmp_path / "none.json"])
    (tmp_path / "torn.json").write_text('{"sheet": ')
    with pytest.raises(UserError, match="torn.json cannot be read as JSON"):
        tally(key_path, [tmp_path / "torn.json"])


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    responses = judging.folder(
        tmp_path / "eval", gad=judging.rows(["a", "b", "c"]), seqkd=judging.rows(["d", "e", "f"])
    )
    out = tmp_path / "sheet"
    argv = ["--sheet.responses", str(responses), "--sheet.a", "gad", "--sheet.b", "seqkd", "--sheet.out", str(out)]
    assert sheet_main(argv) == 0
    assert "sheet.html: 3 prompts; give this file to the raters and keep" in capsys.readouterr().out
    assert sheet_main(argv) == 0  # the same sheet again
    with pytest.raises(UserError, match="key.json belongs to another sheet"):
        sheet_main([*argv, "--sheet.seed", "1"])
    capsys.readouterr()
    key = json.loads((out / "key.json").read_text())
    files = [
        str(write(tmp_path / "1.json", answers(key, {0: WIN, 1: WIN, 2: TIE}, "Ada"))),
        str(write(tmp_path / "2.json", answers(key, {0: WIN, 1: LOSS}, "B|ob"))),
    ]
    assert tally_main([str(out / "key.json"), *files]) == 0
    text = capsys.readouterr().out
    assert text == (out / "tally.md").read_text()
    assert "gad against seqkd on held, judged blind by 2 (3 prompts)" in text
    assert "| Ada | 67 % | 33 % | 0 % |" in text and "| B\\|ob | 50 % | 0 % | 50 % |" in text
    assert "The sheet of B\\|ob is incomplete: 1 prompts have no answer." in text
    assert "Agreement: 50 % of 2 comparisons; Cohen's kappa 0.00 over the 2 prompts" in text
    assert json.loads((out / "tally.json").read_text())["all"]["n"] == 3
    for wrong in ([], ["key.json"], ["--tally.key", "key.json"]):
        with pytest.raises(UserError, match="write: tally KEY.json"):
            tally_main(wrong)


def test_a_set_must_be_named_where_there_are_several(tmp_path: Path) -> None:
    responses = judging.folder(tmp_path, gad=judging.rows(["a"]), seqkd=judging.rows(["b"]))
    (tmp_path / "held").rename(tmp_path / "one")
    judging.folder(tmp_path, gad=judging.rows(["a"]), seqkd=judging.rows(["b"]))
    argv = ["--sheet.responses", str(responses), "--sheet.a", "gad", "--sheet.b", "seqkd"]
    with pytest.raises(UserError, match="several sets, held, one: name one by --sheet.set"):
        sheet_main(argv)
    with pytest.raises(UserError, match="two models are needed"):
        sheet_main(argv[:2])


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), 1e300, 10**400, -1, "3", True, None, [3], {"s": 3}])
def test_seconds_that_no_person_took(seconds: object, tmp_path: Path) -> None:
    key = sheet_of(4).key
    paths = [write(tmp_path / "key.json", key)]
    given = answers(key, {0: WIN, 1: TIE})
    given["answers"][1]["seconds"] = seconds
    paths.append(write(tmp_path / "ada.json", given))
    with pytest.raises(
        UserError, match=r"ada.json, answer 2 \(\w+\): seconds = .* is no time that a person took"
    ) as told:
        tally_main([str(path) for path in paths])
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "key",
    [
        {"pairs": []}, {"pairs": {"p": {"left": "c"}}}, {"pairs": {"p": 3}}, {"pairs": None}, {"a": 3}, {"b": None},
        {"sheet": ["x"]}, {"set": {}},
    ],
)  # fmt: skip
def test_a_damaged_key(key: dict, tmp_path: Path) -> None:
    whole = sheet_of(4).key
    given = write(tmp_path / "ada.json", answers(whole, {0: WIN}))
    with pytest.raises(UserError, match=r"key.json is damaged \(.*\): give the key as it was written"):
        tally(write(tmp_path / "key.json", whole | key), [given])


def test_half_a_surrogate_pair_in_a_key_is_kept_as_its_escape(tmp_path: Path, capsys) -> None:
    key = sheet_of(4).key | {"a": "half \ud83d"}
    given = write(tmp_path / "ada.json", answers(key, {0: WIN}))
    assert tally_main([str(write(tmp_path / "key.json", key)), str(given)]) == 0
    assert json.loads((tmp_path / "tally.json").read_text())["a"] == "half \ud83d"
    assert "half ·" in capsys.readouterr().out


def test_a_raters_name_is_text_and_nothing_else(tmp_path: Path, capsys) -> None:
    key = sheet_of(4).key
    evil = "\x1b[2J<img src=x>|[a](http://x)\u202e"
    tally_main([str(write(tmp_path / "key.json", key)), str(write(tmp_path / "a.json", answers(key, {0: WIN}, evil)))])
    for text in (capsys.readouterr().out, (tmp_path / "tally.md").read_text()):
        assert "·\\[2J&lt;img src=x&gt;\\|\\[a\\]\\(http" in text and "\x1b" not in text and "\u202e" not in text
