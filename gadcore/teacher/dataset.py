"""Training rows out of the store: the same files for the same prompts and replies, in whatever order these came."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gadcore.files import write_jsonl
from gadcore.teacher.prompts import Messages, PromptRow, asked_messages
from gadcore.teacher.reply import MOST_TOKENS, Reply
from gadcore.teacher.settings import CollectConfig
from gadcore.teacher.store import ChatRequest, ReplyStore


@dataclass
class Collected:
    """What the prompts have become; all counts are of different requests.

    outcomes, finish_reasons: {name: count}. served_by: the models as the server named them. told: {what was odd about
    replies: in how many}. dates: (first, last), UTC.
    prompt_chars, response_chars: of the rows in train and eval. response_tokens: where the server counted them.
    """

    prompts: int
    repeated: int
    train: int = 0
    eval: int = 0
    missing: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    finish_reasons: Counter[str] = field(default_factory=Counter)
    served_by: Counter[str] = field(default_factory=Counter)
    told: Counter[str] = field(default_factory=Counter)
    dates: list[str] = field(default_factory=list)
    prompt_chars: list[int] = field(default_factory=list)
    response_chars: list[int] = field(default_factory=list)
    response_tokens: list[int] = field(default_factory=list)


def requests_of(config: CollectConfig, prompts: Sequence[PromptRow]) -> dict[str, tuple[PromptRow, ChatRequest]]:
    """{key: (prompt, its request)}, in the order of the prompts; a repeated prompt stands once, where it was first."""
    requests: dict[str, tuple[PromptRow, ChatRequest]] = {}
    parameters = config.sampling.parameters()
    for row in prompts:
        request = ChatRequest(asked_messages(row, config.prompts.system_prompt), parameters)
        requests.setdefault(request.key(config.endpoint.model, config.endpoint.address), (row, request))
    return requests


def write_rows(
    config: CollectConfig, prompts: Sequence[PromptRow], requests: dict[str, tuple[PromptRow, ChatRequest]],
    store: ReplyStore,
) -> Collected:  # fmt: skip
    """Writes train.jsonl, and eval.jsonl where output.eval_share asks for it, beside the store.

    A row is {"prompt" or "messages", "teacher_response", "source", "teacher"}, in the order of the prompts. Responses
    that were cut are left out without output.keep_cut, refusals without output.keep_refused; empty and damaged ones,
    and those that ended for a reason other than "stop", always.
    """
    collected = Collected(len(prompts), len(prompts) - len(requests))
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "eval": []}
    for key, (row, _) in requests.items():
        stored = store.row(key)
        if stored is None or stored.reply is None:
            collected.missing += 1
            continue
        reply = stored.reply
        _count(collected, reply, stored.received)
        text = reply.text or reply.refusal or ""
        if not _kept(config, reply) or not text.strip():
            continue
        split = "eval" if _share_of(row.messages) < config.output.eval_share else "train"
        rows[split].append(_row(config, row, text))
        collected.prompt_chars.append(sum(len(m["content"]) for m in row.messages))
        collected.response_chars.append(len(text))
    collected.train, collected.eval = len(rows["train"]), len(rows["eval"])
    folder = store.path.parent
    write_jsonl(folder / "train.jsonl", rows["train"])
    if config.output.eval_share:
        write_jsonl(folder / "eval.jsonl", rows["eval"])
    else:
        # One of an earlier call would hold rows that are in train.jsonl now.
        (folder / "eval.jsonl").unlink(missing_ok=True)
    return collected


def _count(collected: Collected, reply: Reply, received: str) -> None:
    collected.outcomes[reply.outcome] += 1
    collected.finish_reasons[str(reply.finish_reason)] += 1
    collected.served_by[reply.model or "(not named)"] += 1
    collected.dates = [min([received, *collected.dates]), max([received, *collected.dates])]
    collected.told.update(reply.told)
    tokens = (reply.usage or {}).get("completion_tokens")
    # A line of an earlier version holds what its server said, whatever that was.
    if type(tokens) is int and 0 <= tokens <= MOST_TOKENS:
        collected.response_tokens.append(tokens)


def _kept(config: CollectConfig, reply: Reply) -> bool:
    kept = {"answered": True, "cut": config.output.keep_cut, "refused": config.output.keep_refused}
    return kept.get(reply.outcome, False)


def _row(config: CollectConfig, row: PromptRow, text: str) -> dict[str, Any]:
    plain = len(row.messages) == 1
    asked = {"prompt": row.messages[0]["content"]} if plain else {"messages": list(row.messages)}
    teacher = config.output.teacher or config.endpoint.model
    return {**asked, "teacher_response": text, "source": row.source, "teacher": teacher}


def _share_of(messages: Messages) -> float:
    """A number in [0, 1) that depends on the prompt alone: more prompts move no row from eval to train."""
    digest = hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48
