"""The data card: what was collected, from whom, how, and what is missing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from gadcore.teacher.client import Tally
from gadcore.teacher.dataset import Collected
from gadcore.teacher.settings import CollectConfig
from gadcore.text import code, markdown

_MEANING = {
    "answered": "ended by itself (finish_reason stop)",
    "cut": "ran into the length limit (finish_reason length)",
    "refused": "refused or filtered (message.refusal, content_filter)",
    "empty": "no text",
    "damaged": "holds what is no text, as half of a surrogate pair",
    "other": "another finish_reason than stop",
}
_QUANTILES = (0, 5, 25, 50, 75, 95, 100)


def data_card(config: CollectConfig, collected: Collected, tally: Tally, others: int) -> str:
    """Markdown. others: replies in the store that belong to other prompts, parameters or models."""
    endpoint = config.endpoint
    facts = {
        "model": markdown(endpoint.model),
        "model as the server names it": _list(collected.served_by),
        "endpoint": markdown(endpoint.host),
        "parameters": code(json.dumps(config.sampling.parameters(), ensure_ascii=False)),
        "system prompt": markdown(config.prompts.system_prompt) if config.prompts.system_prompt else "none",
        "prompts": f"{markdown(config.prompts.source)}: {collected.prompts}, {collected.repeated} of them repeated",
        "collected (UTC)": markdown(" to ".join(collected.dates)) or "nothing yet",
        "answers paid for": f"{tally.spent.requests} (unusable and earlier ones included), "
        f"{tally.spent.prompt} prompt tokens, {tally.spent.response} response tokens"
        + (f", {tally.spent.uncounted} answers estimated" if tally.spent.uncounted else ""),
        "cost": "not known (no prices given)" if tally.cost is None else f"{tally.cost:.4f} by the prices given",
    }
    outcomes = [
        [name, str(collected.outcomes[name]), meaning, "yes" if kept else "no"]
        for (name, meaning), kept in zip(
            _MEANING.items(),
            (True, config.output.keep_cut, config.output.keep_refused, False, False, False),
            strict=True,
        )
    ]
    lengths = {
        "prompt, characters": collected.prompt_chars,
        "response, characters": collected.response_chars,
        "any reply, tokens by the server's count": collected.response_tokens,
    }
    parts = [
        f"# Responses of {markdown(endpoint.model)}",
        f"{collected.train} rows in train.jsonl"
        + (f", {collected.eval} in eval.jsonl" if config.output.eval_share else "")
        + f"; {collected.missing} prompts have no reply.",
        _table(["", ""], [[name, value] for name, value in facts.items()]),
        "## Replies",
        _table(["outcome", "count", "meaning", "in the rows"], outcomes),
        f"Finish reasons: {_list(collected.finish_reasons)}. A refusal that the server does not mark as one counts as "
        "answered.",
        "## Lengths",
        _table(["", *(f"{q} %" for q in _QUANTILES)], [[name, *_quantiles(v)] for name, v in lengths.items()]),
    ]
    if others:
        parts.append(f"replies.jsonl also holds {others} replies to other prompts, parameters, models or addresses.")
    if collected.told:
        rows = [[str(n), markdown(what)] for what, n in collected.told.most_common()]
        parts += ["## Odd about the replies", _table(["replies", "what"], rows)]
    if tally.failed:
        reasons = Counter(tally.failed.values()).most_common(10)
        rows = [[str(n), markdown(reason)] for reason, n in reasons]
        parts += ["## Failed in the last run", _table(["requests", "reason"], rows)]
    parts += [
        "## Terms",
        f"Whether these texts may train another model, and may be passed on, is decided by the licence or terms of use "
        f"of {markdown(endpoint.model)} and by those of the prompts: read both before you do either.",
    ]
    return "\n\n".join(parts) + "\n"


def _quantiles(values: Sequence[int]) -> list[str]:
    if not values:
        return ["–"] * len(_QUANTILES)
    return [f"{value:.0f}" for value in np.percentile(values, _QUANTILES)]


def _list(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{markdown(name)} {count}" for name, count in sorted(counts.items())) or "none"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
