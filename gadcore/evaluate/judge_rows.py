"""Which responses there are to judge, and two models' responses to the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gadcore.errors import UserError
from gadcore.evaluate.responses import ResponseRow, read_first

# Of a set's folder: the folder of an LLM judge's scores, <judge>/<model>.json, the judge by files.file_name().
JUDGED = "judge"


def conversation(row: ResponseRow) -> str:
    """The conversation as one text: the user's own words where there is nothing else, else turn by turn."""
    if len(row.messages) == 1:
        return row.messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in row.messages)


def find(folder: str, sets: Sequence[str], models: Sequence[str] = ()) -> list[tuple[str, str]]:
    """(set, model) of every file of responses below a folder, sorted; `sets`, `models` name some of them, () all.

    Raises UserError where there is none, or where a name given stands for none.
    """
    if not Path(folder).is_dir():
        raise UserError(f"{folder} is no folder: give the one that eval wrote (it holds <set>/<model>.jsonl)")
    there = sorted((path.parent.name, path.stem) for path in Path(folder).glob("*/*.jsonl"))
    for wanted, known in ((sets, {name for name, _ in there}), (models, {model for _, model in there})):
        for name in wanted:
            if name not in known:
                raise UserError(f"{folder} has no {name}: it holds {', '.join(sorted(known)) or 'no responses'}")
    chosen = [(name, model) for name, model in there if (not sets or name in sets) and (not models or model in models)]
    if not chosen:
        raise UserError(f"{folder} holds no such responses (<set>/<model>.jsonl): write them with eval first")
    return chosen


def read_both(folder: Path, models: tuple[str, str]) -> tuple[list[ResponseRow], list[ResponseRow]]:
    """The rows of two models out of a set's folder.

    Raises UserError where they do not answer the same prompts in the same order.
    """
    if models[0] == models[1]:
        raise UserError(f"{models[0]} cannot be compared with itself: name two models, a and b")
    paths = [folder / f"{model}.jsonl" for model in models]
    a, b = (read_first(path) for path in paths)
    for line, (one, other) in enumerate(zip(a, b, strict=False), 1):
        if one.messages != other.messages:
            raise UserError(
                f"line {line} of {paths[1]} answers another prompt than line {line} of {paths[0]}: evaluate both "
                "models on the same rows"
            )
    if len(a) != len(b):
        raise UserError(f"{paths[0]} has {len(a)} rows, {paths[1]} {len(b)}: evaluate both models on the same rows")
    return a, b
