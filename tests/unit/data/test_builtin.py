"""The built-in text (gadcore/data/builtin) is what its data card says it is."""

import json
import math
import re
import sqlite3
import statistics
from collections import Counter
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from rapidfuzz import fuzz

BUILTIN = Path(__file__).resolve().parents[3] / "gadcore" / "data" / "builtin"
COUNTS = {"train": 240, "eval": 60}
KEYS = ["id", "kind", "prompt", "teacher_response"]

# Measured on the files as written: the closest pair of prompts scores 0.33 (trigrams) and 67 (rapidfuzz), two short
# definitions with one frame and different words ("What is a haiku?", "What is a sonnet?"); the closest pair of
# responses scores 0.04 and 61 (shared function words and list marks). A copy with a word or two changed scores far
# above the limits (test_near_duplicate_measure_notices_a_paraphrase).
LIMITS = {"prompt": (0.45, 75.0), "teacher_response": (0.15, 70.0)}

BAD_OPENER = re.compile(
    r"(sure|certainly|of course|absolutely|great|good question|hello|hi|hey|thanks|thank you|here is|here are|here's|"
    r"let me|let us|as an|i|i'm|i can|well|okay|ok|yes|no problem|the answer|to answer|you asked)\b(?!-)",
    re.IGNORECASE,
)
HEDGE = re.compile(r"\b(perhaps|maybe|might|probably|possibly|i think|i believe|it depends|language model)\b", re.I)


def load(split: str) -> list[dict[str, str]]:
    lines = (BUILTIN / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


ROWS = {split: load(split) for split in COUNTS}
ALL = ROWS["train"] + ROWS["eval"]
BY_ID = {row["id"]: row for row in ALL}


def words(text: str) -> list[str]:
    return text.split()


def without_code(text: str) -> str:
    return re.sub(r"`[^`]*`", "CODE", text)


def first_code(row: dict[str, str]) -> str:
    found = re.search(r"`([^`]+)`", row["teacher_response"])
    assert found is not None, row["id"]
    return found.group(1)


def first_sentence(text: str) -> str:
    return re.split(r"(?<=[.?])\"?\s", text, maxsplit=1)[0]


def of_kind(kind: str) -> list[dict[str, str]]:
    return [row for row in ALL if row["kind"] == kind]


def faults(text: str) -> list[str]:
    """What is wrong with one response, by the rules of its style that a machine can see."""
    prose = without_code(text)
    found = []
    if not 15 <= len(words(text)) <= 45:
        found.append("length")
    if not text.endswith("."):
        found.append("ending")
    if text != text.strip() or "  " in text or re.search(r"[\n\r\t]", text):
        found.append("spacing")
    if "!" in prose:
        found.append("exclamation")
    if BAD_OPENER.match(text):
        found.append("opener")
    if HEDGE.search(prose):
        found.append("hedge")
    if re.search(r"\*\*|__|#|^[-*] |[\u2010-\u201f\u2026]", prose):
        found.append("markup or typographic mark")
    if not 2 <= len(re.findall(r"[.?]\"?(?=\s+[\"A-Z]|$)", prose)) <= 3:
        found.append("sentences")
    numbers = [int(n) for n in re.findall(r"(?<![\w(])(\d+)\)", prose)]
    if numbers:
        expected = list(range(1, len(numbers) + 1))
        joined = prose.count(": 1) ") == 1 and all(f"; {n}) " in prose for n in expected[1:])
        if numbers != expected or len(numbers) < 3 or not joined:
            found.append("list form")
    return found


@pytest.mark.parametrize("split", COUNTS)
def test_counts_ids_and_keys(split: str) -> None:
    rows = ROWS[split]
    assert [row["id"] for row in rows] == [f"{split}-{n:03d}" for n in range(1, COUNTS[split] + 1)]
    for row in rows:
        assert list(row) == KEYS
        assert all(isinstance(value, str) and value for value in row.values()), row["id"]


@pytest.mark.parametrize("split", COUNTS)
def test_file_is_plain_utf8_jsonl(split: str) -> None:
    text = (BUILTIN / f"{split}.jsonl").read_bytes().decode("utf-8")
    assert text.endswith("\n") and "\r" not in text and "\\u" not in text
    for line, row in zip(text.splitlines(), ROWS[split], strict=True):
        assert line == json.dumps(row, ensure_ascii=False)


def test_every_kind_is_in_both_files_in_similar_proportion() -> None:
    share = {split: Counter(row["kind"] for row in rows) for split, rows in ROWS.items()}
    assert set(share["train"]) == set(share["eval"])
    assert len(share["train"]) >= 8
    for kind in share["train"]:
        assert abs(share["train"][kind] / 240 - share["eval"][kind] / 60) <= 0.02, kind


def test_style() -> None:
    assert {row["id"]: bad for row in ALL if (bad := faults(row["teacher_response"]))} == {}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("Too short to pass. It ends here.", "length"),
        ("Word " * 45 + "ends here. It stops.", "length"),
        ("The river is long and wide and it flows slowly to the sea. It carries a lot of mud", "ending"),
        ("The river is long and wide and it flows slowly to the sea.\nIt carries a lot of mud.", "spacing"),
        ("The river is long and wide and it flows slowly to the sea! It carries a lot of mud.", "exclamation"),
        ("Sure, the river is long and wide and it flows slowly to the sea. It carries mud.", "opener"),
        ("The river is perhaps long and wide and it flows slowly to the sea. It carries mud.", "hedge"),
        ("The river is **long** and wide and it flows slowly to the sea. It carries a lot of mud.", "markup or"),
        ("The river is long and wide and it flows slowly to the sea and carries a lot of mud.", "sentences"),
        ("The river carries these: 1) mud, 2) sand, 3) gravel and more. It is long and wide and slow.", "list form"),
    ],
)
def test_style_check_can_fail(text: str, fault: str) -> None:
    assert any(found.startswith(fault) for found in faults(text))


def test_lists_and_steps_alone_use_the_list_form() -> None:
    for row in ALL:
        assert (": 1) " in row["teacher_response"]) == (row["kind"] in {"list", "how_to"}), row["id"]


def test_prompts_are_short_and_single_line() -> None:
    lengths = [len(words(row["prompt"])) for row in ALL]
    assert max(lengths) <= 60
    assert sum(6 <= n <= 20 for n in lengths) >= 0.8 * len(ALL)
    assert not [row["id"] for row in ALL if "\n" in row["prompt"] or row["prompt"] != row["prompt"].strip()]


def test_train_and_eval_have_similar_lengths() -> None:
    mean = {s: statistics.mean(len(words(r["teacher_response"])) for r in rows) for s, rows in ROWS.items()}
    assert abs(mean["train"] - mean["eval"]) < 2


def trigrams(text: str) -> frozenset[tuple[str, ...]]:
    tokens = re.findall(r"[^\W_]+", text.lower())
    return frozenset(zip(tokens, tokens[1:], tokens[2:], strict=False))


def near(a: str, b: str, limits: tuple[float, float]) -> bool:
    x, y = trigrams(a), trigrams(b)
    overlap = len(x & y) / len(x | y) if x or y else 0.0
    return overlap >= limits[0] or fuzz.token_sort_ratio(a.lower(), b.lower(), score_cutoff=limits[1]) > 0


@pytest.mark.parametrize("field", LIMITS)
def test_no_near_duplicates(field: str) -> None:
    limit_jaccard, limit_ratio = LIMITS[field]
    texts = [(row["id"], row[field].lower(), trigrams(row[field])) for row in ALL]
    close = []
    for (id_a, a, x), (id_b, b, y) in combinations(texts, 2):
        shared = len(x & y)
        jaccard = shared / (len(x) + len(y) - shared) if shared else 0.0
        if jaccard >= limit_jaccard or fuzz.token_sort_ratio(a, b, score_cutoff=limit_ratio):
            close.append((id_a, id_b))
    assert close == []


def test_near_duplicate_measure_notices_a_paraphrase() -> None:
    text = BY_ID["train-001"]["teacher_response"]
    assert near(text, text.replace("family", "small"), LIMITS["teacher_response"])
    moved = " ".join(sorted(text.split()))
    assert near(text, moved, LIMITS["teacher_response"])
    assert near("How do I poach an egg?", "How do I poach eggs?", LIMITS["prompt"])
    assert not near("How do I poach an egg?", "What is a sonnet?", LIMITS["prompt"])


def test_responses_do_not_share_their_opening() -> None:
    openings = Counter(tuple(words(without_code(row["teacher_response"]))[:3]) for row in ALL if row["kind"] != "code")
    assert max(openings.values()) <= 2


# id -> (the sum done again by Python, the result as it stands in the first sentence)
SUMS: dict[str, tuple[Any, str]] = {
    "train-030": (math.gcd(84, 126), "42"),
    "train-042": (5 * 1.609344, "8.05"),
    "train-060": (Fraction(25 - 7, 3), "6"),
    "train-062": (2**10, "1,024"),
    "train-071": (Fraction(6, 100) * 350, "21"),
    "train-080": (Fraction(sum(a + b == 7 for a in range(1, 7) for b in range(1, 7)), 36), "1/6"),
    "train-084": (math.pi * 7**2, "153.94"),
    "train-087": (Fraction(12 + 18 + 21 + 29, 4), "20"),
    "train-089": (Fraction(40 * 25 * 20, 1000), "20"),
    "train-100": (int("101101", 2), "45"),
    "train-103": (45 % 7, "3"),
    "train-126": (1000 * Fraction(105, 100) ** 2, "1,102.50"),
    "train-132": (Fraction(90 * 1000, 3600), "25"),
    "train-134": (Fraction(3, 4) + Fraction(2, 5), "23/20"),
    "train-135": (math.factorial(5), "120"),
    "train-136": (Fraction(15, 100) * 260, "39"),
    "train-143": (Fraction(180) / Fraction(5, 2), "72"),
    "train-166": (3 * Fraction("14.50") + Fraction("9.90"), "53.40"),
    "train-172": ((17 * 60 + 15) - (9 * 60 + 40), "455"),
    "train-173": ((300 // 50) * (400 // 50), "48"),
    "train-183": (85 * Fraction(80, 100), "68"),
    "train-209": (Fraction(300, 4) * 6, "450"),
    "train-215": (17 * 24, "408"),
    "train-230": (math.sqrt(9**2 + 12**2), "15"),
    "eval-001": (math.lcm(12, 18), "36"),
    "eval-007": (Fraction((5 - 2) * 180, 5), "108"),
    "eval-022": (23 * Fraction(9, 5) + 32, "73.4"),
    "eval-037": (150 * Fraction(120, 100), "180"),
    "eval-042": (Fraction(1, 8) * 100, "12.5"),
    "eval-056": (Fraction(6000, 250), "24"),
}


def test_every_calculation_is_covered() -> None:
    assert set(SUMS) == {row["id"] for row in of_kind("calculation")}


@pytest.mark.parametrize("row_id", SUMS)
def test_calculation(row_id: str) -> None:
    value, shown = SUMS[row_id]
    number = shown.replace(",", "")
    decimals = len(number.partition(".")[2])
    assert abs(Fraction(value) - Fraction(number)) <= (Fraction(1, 2 * 10**decimals) if decimals else Fraction(0))
    first = first_sentence(BY_ID[row_id]["teacher_response"])
    assert re.search(rf"(?<![\d.,/]){re.escape(shown)}(?![\d/]|[.,]\d)", first), first


# id -> (names the one-liner reads, what to look at afterwards (None: its own value), expected)
PYTHON: dict[str, tuple[dict[str, Any], str | None, Any]] = {
    "train-004": ({"items": ["b", "a", "b", "c"]}, "top", "b"),
    "train-020": ({"a": {"x": 1, "y": 1}, "b": {"y": 2}}, None, {"x": 1, "y": 2}),
    "train-048": ({"items": [3, 1, 3, 2, 1]}, None, [3, 1, 2]),
    "train-113": ({"m": [[1, 2, 3], [4, 5, 6]]}, None, [[1, 4], [2, 5], [3, 6]]),
    "train-118": ({"people": [{"age": 9}, {"age": 4}]}, None, [{"age": 4}, {"age": 9}]),
    "train-131": ({"text": " one  two\nthree "}, None, 3),
    "train-157": ({"nums": [1, 2, 0]}, None, False),
    "train-186": ({"a": 1, "b": 2}, "(a, b)", (2, 1)),
    "train-189": ({}, "lines", ["first", "second é"]),
    "train-208": ({"rows": [[1, 2], [], [3]]}, None, [1, 2, 3]),
    "train-231": ({"s": "gadget"}, None, "tegdag"),
    "train-238": ({}, None, [0, 4, 16, 36, 64]),
    "eval-004": ({"d": {"a": 1, "b": 2}}, None, {1: "a", 2: "b"}),
    "eval-023": ({"x": 140}, None, 100),
    "eval-058": ({"n": 42}, None, "00042"),
}
PRINTS = "train-032"


def test_every_python_row_is_covered_and_compiles() -> None:
    python = [row for row in of_kind("code") if "Python" in row["prompt"]]
    assert {row["id"] for row in python} == {*PYTHON, PRINTS}
    for row in python:
        compile(first_code(row), row["id"], "exec")


@pytest.mark.parametrize("row_id", PYTHON)
def test_python_one_liner(row_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("first\nsecond é\n", encoding="utf-8")
    given, look_at, expected = PYTHON[row_id]
    names = dict(given)
    code = first_code(BY_ID[row_id])
    if look_at is None:
        assert eval(code, names) == expected
    else:
        exec(code, names)
        assert eval(look_at, names) == expected


def test_python_one_liner_that_prints(capsys: pytest.CaptureFixture[str]) -> None:
    exec(first_code(BY_ID[PRINTS]), {})
    assert re.fullmatch(r"\d{4}-\d\d-\d\d\n", capsys.readouterr().out)


# id -> (rows of the table the query reads, expected)
SQL: dict[str, tuple[str, list[tuple[Any, ...]], list[tuple[Any, ...]]]] = {
    "train-027": (
        "products(name, price)",
        [("a", 1), ("b", 7), ("c", 3), ("d", 5), ("e", 6), ("f", 4)],
        [("b", 7), ("e", 6), ("d", 5), ("f", 4), ("c", 3)],
    ),
    "train-112": ("users(name, city)", [("x", "Rome"), ("y", "Rome"), ("z", None)], [(None, 1), ("Rome", 2)]),
    "eval-019": ("customers(name, email)", [("x", "x@example.org"), ("y", None)], [("y",)]),
}


def test_every_sql_row_is_covered() -> None:
    assert set(SQL) == {row["id"] for row in of_kind("code") if "SQL" in row["prompt"]}


@pytest.mark.parametrize("row_id", SQL)
def test_sql(row_id: str) -> None:
    table, rows, expected = SQL[row_id]
    base = sqlite3.connect(":memory:")
    try:
        base.execute(f"CREATE TABLE {table}")
        base.executemany(f"INSERT INTO {table.split('(')[0]} VALUES (?, ?)", rows)
        assert base.execute(first_code(BY_ID[row_id])).fetchall() == expected
    finally:
        base.close()


def test_regular_expression() -> None:
    pattern = re.compile(first_code(BY_ID["train-046"]))
    assert pattern.findall("In 1969, flight 12345 left; by 2001 there were 300.") == ["1969", "2001"]


def test_data_card_states_the_counts_of_the_files() -> None:
    card = (BUILTIN / "README.md").read_text(encoding="utf-8")
    table = {kind: (int(t), int(e)) for kind, t, e in re.findall(r"^\| (\w+) \| (\d+) \| (\d+) \|$", card, re.M)}
    counted = {s: Counter(row["kind"] for row in rows) for s, rows in ROWS.items()}
    assert table.pop("total") == (240, 60)
    assert table == {kind: (n, counted["eval"][kind]) for kind, n in counted["train"].items()}
    for split, rows in ROWS.items():
        n = [len(words(row["teacher_response"])) for row in rows]
        line = f"| {split} | {min(n)} | {statistics.median(n):.0f} | {statistics.mean(n):.1f} | {max(n)} |"
        assert line in card, line
    total = sum(len(words(row["teacher_response"])) for row in ALL)
    assert f"All responses together have {total:,} words." in card
    prompts = [len(words(row["prompt"])) for row in ALL]
    assert f"Prompts have {min(prompts)} to {max(prompts)} words, with a median of" in card
    assert f"{sum(6 <= n <= 20 for n in prompts)} of the 300 have 6 to 20" in card.replace("\n", " ")
