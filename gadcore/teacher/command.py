"""python -m gadcore.run collect: prompts in, teacher responses out."""

from __future__ import annotations

import signal
import sys
from collections import Counter
from pathlib import Path

from rich.console import Console

from gadcore.config import loading
from gadcore.files import write_whole
from gadcore.teacher.prompts import read_prompts
from gadcore.teacher.settings import CollectConfig
from gadcore.text import say


def main(arguments: list[str]) -> int:
    """Exit code 0: every prompt has a reply. 1: some have none (failed, or the budget is spent); the same command goes
    on. 128 + signal: stopped. Raises UserError for bad input.
    """
    config = loading.load(arguments, CollectConfig)
    prompts = read_prompts(config.prompts)
    # Only now: the client takes a second to import.
    from gadcore.teacher.card import data_card
    from gadcore.teacher.client import ask_all, exit_code
    from gadcore.teacher.dataset import requests_of, write_rows
    from gadcore.teacher.progress import progress
    from gadcore.teacher.store import ReplyStore

    folder = Path(config.output.dir)
    requests = requests_of(config, prompts)
    with ReplyStore(folder / "replies.jsonl", config.endpoint.address) as store:
        write_whole(folder / "config.toml", loading.dump(config))
        console = Console(stderr=True, markup=False, emoji=False, highlight=False)
        for note in store.notes():
            say(f"note {note}", sys.stderr)
        try:
            with progress(console, "collect") as watch:
                asked = [request for _, request in requests.values()]
                tally = ask_all(config.endpoint, asked, store, budget=config.budget, watch=watch)
        except KeyboardInterrupt:
            say(f"stopped at once; what was answered is in {store.path}, the same command goes on")
            return 128 + signal.SIGINT
        collected = write_rows(config, prompts, requests, store)
        others = len(store) - sum(key in store for key in requests)
        write_whole(folder / "README.md", data_card(config, collected, tally, others))

    counts = ", ".join(f"{count} {name}" for name, count in sorted(collected.outcomes.items())) or "no replies"
    say(
        f"{tally.asked_for} prompts: {counts}, {len(tally.failed)} failed, {tally.unasked} not asked; "
        f"{tally.kept} of the replies were there before"
    )
    for reason, count in Counter(tally.failed.values()).most_common(10):
        say(f"failed ({count}): {reason}")
    for what, count in tally.odd.most_common(10):
        say(f"odd ({count}): {what}")
    if tally.stopped:
        say(f"stopped: {tally.stopped}")
    if others:
        say(f"{store.path} also holds {others} replies to other prompts, parameters, models or addresses")
    money = "" if tally.cost is None else f", {tally.cost:.4f} by the prices given"
    say(f"spent so far: {tally.spent.requests} answers, {tally.spent.tokens} tokens{money}")
    eval_rows = f", {folder / 'eval.jsonl'}: {collected.eval}" if config.output.eval_share else ""
    say(f"rows: {folder / 'train.jsonl'}: {collected.train}{eval_rows}; data card: {folder / 'README.md'}")
    if tally.complete:
        return 0
    say("the same command asks for what is missing")
    return exit_code(tally.stopped)
