"""Rows of training data: conversations with the teacher's response, from files or from the hub.

gadcore.data.forms says which forms a row may have, gadcore.data.sources where rows may lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from gadcore.data.columns import Advice, advise, by_data_columns
from gadcore.data.forms import LackingColumns, RawRow, check_columns, parse_row, wanted_columns
from gadcore.data.sources import BUILTIN, Source, Split
from gadcore.errors import UserError

# Of a list of bad rows: reasons that are told, and places of each.
_REASONS, _PLACES = 12, 5
# So many rows without a good one among them, and no further one is read.
_HOPELESS = 1000
# Ends the first line of what is said of rows that were left out.
SKIPPED = '(data.bad_rows = "skip")'


class BadRowsError(UserError):
    """Rows of a source cannot be used: the message has them all."""


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used. where: its place, as that of a RawRow. reason: the rest of a sentence.

    advice: how its columns would be named, where it lacks some.
    """

    where: str
    reason: str
    advice: Advice | None = None


@dataclass
class BadRows:
    """Rows that cannot be used: all are counted, and named by their reasons as far as a screen holds them.

    read: rows that were looked at, the good ones as well. told: how the command is told which columns to read.
    """

    read: int = 0
    count: int = 0
    told: Callable[[Advice], str] = by_data_columns
    advice: Advice | None = None
    reasons: dict[str, tuple[int, list[str]]] = field(default_factory=dict)
    _more: int = 0

    def add(self, row: BadRow) -> None:
        self.count += 1
        self.advice = self.advice or row.advice
        if row.reason not in self.reasons and len(self.reasons) == _REASONS:
            self._more += 1
            return
        count, places = self.reasons.get(row.reason, (0, []))
        self.reasons[row.reason] = count + 1, [*places, row.where][:_PLACES]

    @property
    def hopeless(self) -> bool:
        """Whether nothing but bad rows has come, and so many that it is no matter of single rows."""
        return self.all and self.count >= _HOPELESS

    @property
    def all(self) -> bool:
        """Whether no row is good, so that none would be left."""
        return 0 < self.read <= self.count

    def error(self, source: str, *, may_skip: bool = False) -> UserError:
        """All of them at once. may_skip: the command has the setting data.bad_rows, which is named where it helps."""
        may_skip = may_skip and not self.all
        # What would make rows of these may break those that are good.
        mend = self.told(self.advice) if self.advice and self.all else ""
        if self.count == 1:
            ((reason, (_, (where,))),) = self.reasons.items()
            advice = f"; {mend}" if mend else " (--data.bad_rows skip leaves such rows out)" if may_skip else ""
            return BadRowsError(f"{where}: {reason}{advice}")
        take_out = "mend them" if self.all else "mend them or take them out"
        advice = mend or ("mend them, or leave them out by --data.bad_rows skip" if may_skip else take_out)
        of = f"the first {self.read}" if self.hopeless else f"{self.read}"
        return BadRowsError(f"{self.count} of {of} rows of {source} cannot be used: {advice}\n{self._listed()}")

    def sentence(self, source: str) -> str:
        """Of rows that were left out."""
        return (
            f"{self.count} of {self.read} rows of {source} cannot be used and were left out {SKIPPED}\n{self._listed()}"
        )

    def _listed(self) -> str:
        lines = []
        for reason, (count, places) in self.reasons.items():
            more = f" and {count - len(places)} more" if count > len(places) else ""
            lines.append(f"  {', '.join(places)}{more}: {reason}")
        if self._more:
            lines.append(f"  and {self._more} for other reasons")
        return "\n".join(lines)


def read_rows(
    source: Source, columns: Mapping[str, str], limit: int | None = None, *, skip: bool = False
) -> Iterator[RawRow | BadRow]:
    """The rows of a source in order, good and bad.

    columns: column map, as gadcore.data.forms has it; the rows that come with gadcore need none.
    limit: at most so many rows are read; with `skip` the bad ones do not count.
    Raises UserError for what cannot be read any further.
    """
    columns = {} if source.name == BUILTIN else columns
    check_columns(columns, source.name)
    left = limit
    # Of the first row that lacks columns, and what it is given to: others like it.
    advice, like = None, None
    for where, record in source.records(wanted_columns(columns)):
        if left == 0:
            return
        row: RawRow | BadRow
        try:
            row = parse_row(record, columns, where)
        except UserError as error:
            if like is None and isinstance(error, LackingColumns):
                advice, like = advise(error, source), error.names
            lacks = isinstance(error, LackingColumns) and error.names == like
            row = BadRow(where, str(error).removeprefix(f"{where}: "), advice if lacks else None)
        if left is not None and not (skip and isinstance(row, BadRow)):
            left -= 1
        yield row


def good_rows(rows: Iterator[RawRow | BadRow], bad: BadRows) -> Iterator[RawRow]:
    """The good ones; the bad ones are added to `bad`. Ends early where there are bad ones alone."""
    for row in rows:
        bad.read += 1
        if isinstance(row, RawRow):
            yield row
            continue
        bad.add(row)
        if bad.hopeless:
            return


def load_rows(
    source: str,
    columns: Mapping[str, str],
    limit: int | None = None,
    *,
    split: Split = "train",
    told: Callable[[Advice], str] = by_data_columns,
) -> list[RawRow]:
    """Reads the rows of a source, in order.

    source: "builtin" (the rows that come with gadcore), a file (JSON lines, a JSON array, CSV, parquet), a directory of
      these (read in the order of their names), or a hub id "owner/name" or "owner/name:split".
    columns, limit: as of read_rows().
    split: chooses the file of the built-in data, and for a hub id without a split its "train" or its "test" split.
    told: as of BadRows.

    Raises UserError that names every row which cannot be used: nothing is skipped but blank lines.
    """
    bad = BadRows(told=told)
    rows = list(good_rows(read_rows(Source.find(source, split), columns, limit), bad))
    if bad.count:
        raise bad.error(source)
    if not rows:
        raise no_rows(source)
    return rows


def no_rows(source: str) -> UserError:
    return UserError(f"{source} has no rows: give a source with at least one prompt and response")
