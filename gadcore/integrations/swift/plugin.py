"""GAD in ms-swift (4.6): a reward for GRPO, by the discriminator service.

    swift rlhf --rlhf_type grpo .. --reward_funcs gadcore \\
        --external_plugins "$(python -c 'import gadcore.integrations.swift as m; print(m.__path__[0])')/plugin.py"

The data set has, beside messages, a column `label`: see gadcore.integrations.text_rewards; rows of an evaluation need
"held_out": true in theirs, since a reward is not told. Groups that are split over ranks are put together, and rank 0
sends one request a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gadcore.errors import UserError
from gadcore.integrations.text_rewards import Sample, by_prompt, scores

try:
    from swift.rewards import ORM, orms
except ImportError as error:
    raise UserError(f"gadcore.integrations.swift needs ms-swift 4.6, which does not load: {error}") from error


class GADReward(ORM):  # type: ignore[misc]
    """D(x, y) of every completion."""

    def __call__(
        self,
        completions: Sequence[str],
        messages: Sequence[list[dict[str, str]]] = (),
        prompt_id: Sequence[str] = (),
        is_truncated: Sequence[bool] = (),
        label: Sequence[Any] | None = None,
        **_: Any,
    ) -> list[float]:
        """messages: the conversations, each with its completion at the end."""
        if label is None:
            raise UserError("the data set has no column 'label' with the teacher's text, a row's number or an object")
        rows = [
            (key, told, [{"role": m["role"], "content": m["content"]} for m in talk[:-1]], Sample(text, not cut))
            for key, told, talk, text, cut in zip(prompt_id, label, messages, completions, is_truncated, strict=True)
        ]
        everyone, rank = _gathered(rows)
        together = [row for share in everyone for row in share]
        found = _from_first(lambda: _scores(together))
        begin = sum(map(len, everyone[:rank]))
        return found[begin : begin + len(rows)]


def _scores(rows: Sequence[tuple[str, Any, list[dict[str, str]], Sample]]) -> list[float]:
    places = by_prompt([row[0] for row in rows])
    found = scores([(rows[own[0]][1], rows[own[0]][2], [rows[i][3] for i in own]) for own in places])
    by_place = {i: score for own, row in zip(places, found, strict=True) for i, score in zip(own, row, strict=True)}
    return [by_place[i] for i in range(len(rows))]


def _gathered(rows: Any) -> tuple[list[Any], int]:
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return [rows], 0
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, rows)
    return shares, dist.get_rank()


def _from_first(make: Any) -> Any:
    """What rank 0 makes, or its error, on every rank."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return make()
    told: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            told = [make()]
        except UserError as error:
            told = [str(error)]
    dist.broadcast_object_list(told)
    if isinstance(told[0], str):
        raise UserError(told[0])
    return told[0]


orms["gadcore"] = GADReward
