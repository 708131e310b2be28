"""What the tables of all suites are made with: Markdown, where results come from, rows shown as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bench import record

Row = dict[str, Any]
# Rows of a suite's results by its name.
Read = Callable[[str], list[Row]]

# Facts of a run, told once for a file and not in every line of a table.
FACTS = ("suite", "commit", "machine", "versions")


def rows_of(suite: str) -> list[Row]:
    """Rows of a suite in bench/results, [] where it was not run."""
    return record.read(record.path_of(suite))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; columns whose cells are all numbers are set to the right."""
    cells = [list(row) for row in rows]
    right = [bool(cells) and all(_numeric(row[i]) for row in cells) for i in range(len(header))]
    rule = ["---:" if r else "---" for r in right]
    return "\n".join("| " + " | ".join(line) + " |" for line in [list(header), rule, *cells])


def _numeric(cell: str) -> bool:
    return not cell or cell == "-" or cell[0].isdigit() or cell[0] in "-+." or cell.startswith("gate")


def missing(suite: str) -> list[str]:
    """The block of a suite that was not run."""
    return [f"Not run: there is no `bench/results/{suite}.json`."]


def provenance(rows: Sequence[Row]) -> str:
    """Where a file's results come from, in a sentence for each different origin."""
    said: list[str] = []
    for row in rows:
        machine, versions = row.get("machine") or {}, row.get("versions") or {}
        facts = [f"commit {row['commit']}"] if row.get("commit") else []
        facts += [f"{key.replace('_', ' ')} {cell(value)}" for key, value in (machine | versions).items() if value]
        sentence = "Measured at " + ", ".join(facts) + "." if facts else ""
        if sentence and sentence not in said:
            said.append(sentence)
    return "\n\n".join(said)


def as_they_are(
    rows: Sequence[Row],
    suite: str,
    about: str,
    *,
    by: str | None = None,
    summary: Callable[[Sequence[Row]], str] | None = None,
) -> list[str]:
    """Blocks of a suite's rows as a table, or as one for each value of the field `by`. about: stands above them."""
    if not rows:
        return missing(suite)
    blocks = [provenance(rows), about] + ([summary(rows)] if summary else [])
    flattened = [flat({key: value for key, value in row.items() if key not in FACTS}) for row in rows]
    if by is None:
        blocks += compact(flattened)
    else:
        for value in dict.fromkeys(row.get(by) for row in flattened):
            mine = [{k: v for k, v in row.items() if k != by} for row in flattened if row.get(by) == value]
            blocks += [f"### {cell(value)}", *compact(mine)]
    return [block for block in blocks if block]


def compact(rows: Sequence[Row]) -> list[str]:
    """A field with one value in all rows is told once, above the table; one without a value nowhere is not told."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = {name: [cell(row.get(name)) for row in rows] for name in names}
    cells = {name: column for name, column in cells.items() if set(column) != {"-"}}
    same = [name for name, column in cells.items() if len(rows) > 1 and len(set(column)) == 1]
    differing = [name for name in cells if name not in same]
    told = ", ".join(f"{_label(name)} {cells[name][0]}" for name in same)
    body = zip(*(cells[name] for name in differing), strict=True)
    return [f"In all rows: {told}." if told else "", table([_label(name) for name in differing], body)]


def flat(row: Row) -> Row:
    """Nested objects become fields of their own."""
    out: Row = {}
    for key, value in row.items():
        if isinstance(value, dict):
            out.update({f"{key}.{inner}": entry for inner, entry in flat(value).items()})
        else:
            out[key] = value
    return out


def _label(name: str) -> str:
    return name.replace("_", " ").replace(".", ": ")


def cell(value: Any) -> str:
    """A value as a cell of a table."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.3g}"
    if isinstance(value, list):
        return " ".join(map(cell, value))
    return str(value).replace("|", "\\|").replace("\n", " ")


def mib(count: int) -> str:
    """Bytes in MiB."""
    return f"{count / 2**20:.0f}"
