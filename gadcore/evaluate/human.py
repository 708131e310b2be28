"""A blind sheet for people: two models' responses to the same prompts, side by side, in an HTML file that stands alone.

Which model is A and which is B is drawn per prompt, and so is the order of the prompts. The sheet holds texts and
opaque pair ids; what they stand for lies in the key, a JSON file that stays with whoever made the sheet:

    {"sheet": id, "a": model, "b": model, "set": name, "seed": .., "pairs": {pair id: {"row": .., "left": "a" or "b"}}}

People export {"sheet": id, "rater": name, "pairs": count, "answers": [{"pair": id, "choice": "left" | "right" | "tie",
"seconds": ..}, ..]}, which gadcore.evaluate.human_tally counts.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from gadcore.evaluate.responses import ResponseRow
from gadcore.record.html import standalone
from gadcore.text import visible


@dataclass(frozen=True)
class Sheet:
    """page: the HTML. key: what the pair ids stand for, as in the module's docstring."""

    page: str
    key: dict[str, Any]


def make_sheet(
    a: tuple[str, Sequence[ResponseRow]],
    b: tuple[str, Sequence[ResponseRow]],
    *,
    set_name: str,
    title: str,
    seed: int,
    prompts: int | None = None,
) -> Sheet:
    """A sheet on (model, rows) of a and b, whose rows i answer the same prompt; the same arguments give the same bytes.

    prompts: how many, drawn at random, at most; None: all.
    """
    (a_name, a_rows), (b_name, b_rows) = a, b
    rng = random.Random(f"{seed} {set_name} {a_name} {b_name}")
    order = rng.sample(range(len(a_rows)), min(prompts or len(a_rows), len(a_rows)))
    shown, hidden = [], {}
    for row in order:
        # Ids from the random numbers too: one made of the row's number alone would be known to every reader.
        pair, left = f"{rng.getrandbits(48):012x}", rng.choice("ab")
        texts = visible(a_rows[row].response), visible(b_rows[row].response)
        messages = [{name: visible(text) for name, text in turn.items()} for turn in a_rows[row].messages]
        left_text, right_text = texts if left == "a" else texts[::-1]
        shown.append({"id": pair, "messages": messages, "left": left_text, "right": right_text})
        hidden[pair] = {"row": row, "left": left}
    sheet = hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:12]
    key = {"sheet": sheet, "a": a_name, "b": b_name, "set": set_name, "seed": seed, "pairs": hidden}
    # Inside a script element nothing is unescaped, so what could end it is written as JSON escapes.
    content = json.dumps({"id": sheet, "pairs": shown}).replace("<", "\\u003c")
    return Sheet(standalone("gadcore.evaluate", "human_sheet", title, sheet=Markup(content)), key)
