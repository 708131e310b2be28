"""A line of the doctor's table."""

from __future__ import annotations

from typing import Literal, NamedTuple

# wrong: a run fails, or is not what was meant. note: a run goes on without, or slower.
Status = Literal["ok", "note", "wrong"]


class Check(NamedTuple):
    """name: what was looked at. value: what was found. mend: the command or step that helps; "" where all is well."""

    name: str
    value: str
    status: Status = "ok"
    mend: str = ""
