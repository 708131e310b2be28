"""Values and damage that no program writes on purpose, for property tests; how many examples those try.

GADCORE_EXAMPLES=5000 looks much further than CI does.
"""

from __future__ import annotations

import json
import os
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

CI_EXAMPLES = 60
EXAMPLES = int(os.environ.get("GADCORE_EXAMPLES", CI_EXAMPLES))
thorough = settings(
    max_examples=EXAMPLES, deadline=None, database=None, derandomize=EXAMPLES == CI_EXAMPLES,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)  # fmt: skip

# Texts of JSON, so that they may be what Python's json does not write.
ODD = (
    "null", "true", "false", "0", "-1", "1e400", "-1e400", "NaN", "Infinity", "-0.0", "1" + "0" * 400, "9" * 5000,
    "1000000", "1000000000", "1000000000000",
    "5e-324", "1e308", '""', '"\\ud83d"', '"\\u0000\\u001b[2J\\u202e"', "[]", "{}", "[[]]", '{"a": {}}',
    '"' + "x" * 5000 + '"',
    "[" * 900 + "]" * 900, '{"a":' * 900 + "1" + "}" * 900, "[" * 50_000 + "]" * 50_000, "1.5", '"stop"', '"3"',
)  # fmt: skip


@st.composite
def odd_json(draw: st.DrawFn, value: Any) -> str:
    """The JSON text of a value in which a few places, at any depth, hold something else, or nothing."""
    places = _places(value)
    chosen = draw(st.lists(st.sampled_from(places), min_size=1, max_size=3, unique=True))
    changes = {place: draw(st.sampled_from((*ODD, None))) for place in chosen}
    return _written(value, (), changes)


@st.composite
def odd_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """The content with a part cut out, doubled, or overwritten."""
    start = draw(st.integers(0, len(content)))
    end = draw(st.integers(start, min(len(content), start + 60)))
    kind = draw(st.sampled_from(["cut", "cut to the end", "double", "overwrite"]))
    if kind == "cut to the end":
        return content[:start]
    middle = {"cut": b"", "double": content[start:end] * 2, "overwrite": draw(st.binary(max_size=20))}[kind]
    return content[:start] + middle + content[end:]


def _places(value: Any, at: tuple = ()) -> list[tuple]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for name, item in inside for place in _places(item, (*at, name)))]


def _written(value: Any, at: tuple, changes: dict[tuple, str | None]) -> str:
    if at in changes:
        return changes[at] or "null"
    if isinstance(value, dict):
        gone = {name for name in value if (*at, name) in changes and changes[(*at, name)] is None}
        kept = (f"{json.dumps(n)}: {_written(v, (*at, n), changes)}" for n, v in value.items() if n not in gone)
        return "{" + ", ".join(kept) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_written(v, (*at, i), changes) for i, v in enumerate(value)) + "]"
    return json.dumps(value)
