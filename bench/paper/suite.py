"""The paper's findings on toys: rows of every arm and seed, for docs/measured/findings.md."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from bench import options, record
from gadcore.errors import UserError

EXPERIMENTS = ("mixture", "language", "fresh")
PARITY_ARMS = ("before", "seqkd", "gad", "oracle")
SEEDS = 10
# Seeds below were looked at when the settings were chosen.
FIRST = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="?", metavar="WHAT", help=f"{', '.join(EXPERIMENTS)}; default all")
    parser.add_argument("--seeds", type=options.count, default=SEEDS, help=f"how many, default {SEEDS}")
    parser.add_argument(
        "--first", type=options.seed, default=FIRST, help=f"the first one, default {FIRST}; a later one goes on there"
    )
    parser.add_argument("--arms", type=options.names, help="of the language, default all: gad,frozen for instance")


def run(
    quick: bool, what: str | None = None, seeds: int = SEEDS, first: int = FIRST, arms: Sequence[str] | None = None
) -> Iterator[dict[str, Any]]:
    """A row an arm and seed, as soon as it is there. quick: a twentieth of the steps, one seed; for tests, its results
    say nothing.

    what: one of EXPERIMENTS, default all. fresh: of the language, only the arms that fresh discriminators follow;
    language has them too. arms: of the language, default all. Raises UserError for an experiment or an arm that there
    is not.
    """
    if what not in (None, *EXPERIMENTS):
        raise UserError(f"no experiment {what}: there are {', '.join(EXPERIMENTS)}")
    import torch

    from bench.paper.language_runs import ARMS, WITH_FRESH

    chosen = ARMS if arms is None else tuple(arms)
    if unknown := [arm for arm in chosen if arm not in ARMS]:
        raise UserError(f"no arm {unknown[0]} of the language: there are {', '.join(ARMS)}")
    experiments = EXPERIMENTS if what is None else (what,)
    torch.set_num_threads(1)
    shorter = 20 if quick else 1
    for seed in range(first, first + (1 if quick else seeds)):
        if "mixture" in experiments:
            yield from _mixture(seed, shorter)
        if "language" in experiments:
            yield from _language("styles", seed, shorter, chosen)
            yield from _language("parity", seed, shorter, [arm for arm in PARITY_ARMS if arm in chosen])
        elif "fresh" in experiments:
            yield from _language("styles", seed, shorter, WITH_FRESH)


def _mixture(seed: int, shorter: int) -> Iterator[dict[str, Any]]:
    from bench.paper import mixture, mixture_runs

    for teacher in mixture.TEACHERS:
        for arm in mixture_runs.ARMS:
            row = mixture_runs.run(teacher, arm, seed, shorter=shorter)
            record.say(
                f"mixture {teacher.name} {arm} seed {seed}: {row['modes']} modes, reverse KL {row['reverse_kl']:.2f}, "
                f"{row['seconds']:.0f} s"
            )
            yield row


def _language(name: Any, seed: int, shorter: int, arms: Sequence[str]) -> Iterator[dict[str, Any]]:
    from bench.paper import language_runs
    from bench.paper.language import Language

    if not arms:
        return
    experiment = language_runs.Experiment(Language(name), seed, shorter=shorter)
    for arm in arms:
        row = experiment.run(arm)
        record.say(
            f"language {name} {arm} seed {seed}: valid {row['in_domain']['valid']:.3f}, "
            f"out of domain {row['out_of_domain']['valid']:.3f}, reverse KL {row['in_domain']['reverse_kl']:.2f}, "
            f"{row['seconds']:.0f} s"
        )
        yield row


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row is a result of: a newer one takes its place."""
    return row["experiment"], row.get("geometry") or row["language"], row["arm"], row["seed"]
