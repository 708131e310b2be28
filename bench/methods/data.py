"""The data sets of `python -m bench methods`: rows to train on, held-out rows, and rows of another domain.

Each is written as three files, train.jsonl, held_out.jsonl and elsewhere.jsonl. `house` and `real` are texts; of the
two designed sets the responses can be checked by a rule, and theory says beforehand who must win.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gadcore.data
from gadcore.errors import UserError
from gadcore.files import write_jsonl

Row = dict[str, Any]
Sets = dict[str, list[Row]]

TRAIN, HELD_OUT, ELSEWHERE = "train", "held_out", "elsewhere"
SETS = (HELD_OUT, ELSEWHERE)
# Kinds of the built-in rows that nobody trains on: the other domain.
KEPT_OUT = ("comparison", "summary")
# In a folder of real text, in the order of SETS.
REAL_FILES = ("test.jsonl", "ood_vicuna.jsonl")

LETTERS = tuple("abcdefghijkl")
# Never together in a training prompt, always in one of the other domain.
UNSEEN = ("k", "l")
ASKED = 6
DESIGNED_ROWS = {TRAIN: 2000, HELD_OUT: 200, ELSEWHERE: 200}


# Of the two manners, (by the number of a part, odd or even) the openers of either: one has a single word where the
# other has three, in turn, so that the likeliest word belongs to the other manner than the one before.
MANNERS = (0.55, 0.45)
OPENERS = ((("so",), ("thus", "hence", "then")), (("but", "yet", "still"), ("and",)))
PARTS = (("red", "green", "blue"), ("one", "two", "three"), ("sun", "moon", "star"))


@dataclass(frozen=True)
class Design:
    """respond: the teacher. holds: whether a response to a prompt is right. window: of the student's attention, tokens;
    None: it sees all. prediction: written before any run that is reported."""

    respond: Callable[[Sequence[str], random.Random], list[str]]
    holds: Callable[[Sequence[str], Sequence[str]], bool]
    window: int | None
    prediction: str


def _in_a_manner(words: Sequence[str], rng: random.Random) -> list[str]:
    manner = rng.choices((0, 1), MANNERS)[0]
    return [word for i, part in enumerate(PARTS) for word in (rng.choice(OPENERS[i % 2][manner]), *part)]


def _keeps_to_one(asked: Sequence[str], said: Sequence[str]) -> bool:
    each = 1 + len(PARTS[0])
    parts = [tuple(said[i : i + each]) for i in range(0, len(said), each)]
    whole = len(said) == each * len(PARTS) and all(part[1:] == rest for part, rest in zip(parts, PARTS, strict=True))
    return whole and any(all(part[0] in OPENERS[i % 2][m] for i, part in enumerate(parts)) for m in (0, 1))


DESIGNS = {
    "manners": Design(
        _in_a_manner,
        _keeps_to_one,
        3,
        "GAD must win. The teacher begins each of three parts with a word of one of two manners, and keeps to the "
        "manner that it began with; the student's attention reaches back three tokens, so that it cannot know which "
        "one that was. Cross-entropy can only mix the manners: its optimum is right in .257 of the responses, whatever "
        "the data and the steps. The optimum of the reverse KL keeps to one manner and is always right, and D, which "
        "reads the whole response, sees where two are mixed. Predicted: the share of right responses is higher by .3 "
        "or more with GAD after the plateau warmup than with SeqKD, at equal data and at equal seconds.",
    ),
    "copies": Design(
        lambda words, rng: list(words),
        lambda asked, said: list(asked) == list(said),
        None,
        "GAD must not win. The teacher says the prompt's six words in their order: one response to a prompt, which "
        "the student can hold, so that the optimum of cross-entropy is the teacher itself, where no D tells the two "
        "apart and rewards are noise. Predicted: the share of right responses with GAD is not higher than SeqKD's by "
        ".02 or more, at equal data and at equal seconds.",
    ),
}


def write(name: str, folder: Path, source: Path | None, seed: int, rows: int | None = None) -> None:
    """Writes the files of a data set, all or none. source: folder of real text, for `real`. seed: of a designed one.
    rows: no more than these in any file.

    Raises UserError where `real` has no folder or the folder lacks a file.
    """
    found = house() if name == "house" else real(source) if name == "real" else designed(name, seed)
    for each, lines in found.items():
        write_jsonl(folder / f"{each}.jsonl", lines[:rows])


def house() -> Sets:
    """The built-in rows; those of the kinds KEPT_OUT, of both files, are the other domain."""
    folder = Path(gadcore.data.__path__[0]) / "builtin"
    files = {name: list(_lines(folder / f"{name}.jsonl")) for name in ("train", "eval")}
    apart = {name: [row for row in rows if row["kind"] in KEPT_OUT] for name, rows in files.items()}
    kept = {name: [row for row in rows if row["kind"] not in KEPT_OUT] for name, rows in files.items()}
    return {TRAIN: kept["train"], HELD_OUT: kept["eval"], ELSEWHERE: apart["eval"] + apart["train"]}


def real(folder: Path | None) -> Sets:
    """Of a folder with train.jsonl and REAL_FILES, each row with prompt and teacher_response."""
    if folder is None:
        raise UserError("--data real needs --folder DIR with train.jsonl, test.jsonl and ood_vicuna.jsonl")
    names = dict(zip((TRAIN, *SETS), ("train.jsonl", *REAL_FILES), strict=True))
    if missing := [name for name in names.values() if not (folder / name).is_file()]:
        raise UserError(f"--folder {folder} lacks {', '.join(missing)}: give a folder that has them")
    return {each: list(_lines(folder / name)) for each, name in names.items()}


def designed(name: str, seed: int) -> Sets:
    """A prompt is ASKED of LETTERS, a response what Design.respond makes of them."""
    rng, design, found = random.Random(f"{name} {seed}"), DESIGNS[name], {}
    for each, count in DESIGNED_ROWS.items():
        rows: list[Row] = []
        while len(rows) < count:
            words = rng.sample(LETTERS, ASKED)
            if all(word in words for word in UNSEEN) == (each == ELSEWHERE):
                rows.append({"prompt": " ".join(words), "teacher_response": " ".join(design.respond(words, rng))})
        found[each] = rows
    return found


def right(name: str, prompt: str, response: str, finished: bool) -> float:
    """1 where a response to a prompt of a designed set is right and ended by itself, else 0."""
    return float(finished and DESIGNS[name].holds(prompt.split(), response.split()))


def _lines(path: Path) -> Iterator[Row]:
    for line in path.read_text(encoding="utf-8").removesuffix("\n").split("\n"):
        row = json.loads(line)
        yield {key: row[key] for key in ("prompt", "teacher_response", "kind") if key in row}
