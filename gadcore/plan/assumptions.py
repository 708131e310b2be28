"""Figures that a prediction rests on, each with its unit and where it comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from gadcore.config.loading import nearest
from gadcore.errors import UserError

# What is assumed beside the figures.
RULES = (
    "responses are exponential in length, cut at the limit, with the mean above",
    "micro-batches are as full as their budget says, but that a response of full length is never cut",
    "states follow each other, and nothing that moves between device and host is hidden behind computing",
    "page-locked memory takes the bytes that are asked for; a sampler that sleeps takes none, on either side",
    "under autocast the backward pass reads the casts of the weights: where it computes layers again, of one at a time",
    "starting up, held-out data that is encoded, and what a tracker does take no time",
)
# Shares of a whole that something has to be left of.
_TAKEN_OFF = ("elementwise_share", "reserve_share")


@dataclass(frozen=True)
class Assumption:
    """One figure. why: where it comes from, in a few words."""

    name: str
    value: float
    unit: str
    why: str


class Assumptions(Mapping[str, float]):
    """Figures by name, in order."""

    def __init__(self, items: Mapping[str, Assumption] | list[Assumption]) -> None:
        self._items = dict(items) if isinstance(items, Mapping) else {item.name: item for item in items}

    def __getitem__(self, name: str) -> float:
        return self._items[name].value

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def listed(self) -> list[Assumption]:
        """Every figure with its unit and origin."""
        return list(self._items.values())

    def replaced(self, figures: Mapping[str, float], why: str) -> Assumptions:
        """With other values for some names. Raises UserError for a name that is not there, or an impossible share."""
        items = dict(self._items)
        for name, value in figures.items():
            if name not in items:
                close = nearest(name, items)
                hint = f"did you mean {close}?" if close else f"choose from {', '.join(items)}"
                raise UserError(f"there is no assumption {name} ({why}); {hint}")
            if items[name].unit == "share" and not 0 < value <= (0.99 if name in _TAKEN_OFF else 1):
                raise UserError(f"{name} = {value:g} ({why}) is a share: give a number above 0, and 1 at most")
            items[name] = replace(items[name], value=float(value), why=why)
        return Assumptions(items)
