"""Padded rows of TRL as packed groups, and a model's forward pass over them.

TRL pads prompts on the left and completions on the right, a row for every sample, so that a prompt passes through the
model once for each of its samples. Here rows of equal prompts become one group, [x | y^1 | .. | y^N] without padding,
and what is computed for its tokens goes back to where they stand in TRL's tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gadcore.data.groups import GroupedBatch, GroupTokens, micro_batches, select
from gadcore.models.backbone import cost_of, predicting_states, prune_last_layer, use_packed_attention
from gadcore.models.fused import fuse_backbone

# What a head makes of hidden states [R, H] of the tokens that predict R response tokens: weight [V, H], bias [V].
Head = Callable[[Tensor, Tensor, Tensor | None], Any]


@dataclass(frozen=True)
class Rows:
    """Response tokens of packed rows, and where they stand in TRL's tensors [B, C].

    batch: of the rows that have a response. row, column: [R] int64, of every response token of the batch, in order.
    lengths: tokens of every response. row_of: [S] int64, the row of every response.
    """

    batch: GroupedBatch
    row: Tensor
    column: Tensor
    lengths: tuple[int, ...]
    row_of: Tensor

    def taken(self, padded: Tensor) -> Tensor:
        """[R], what a padded tensor [B, C] says of every response token."""
        return padded[self.row, self.column]

    def put(self, values: Tensor, shape: tuple[int, int] | torch.Size) -> Tensor:
        """[B, C] with the values [R] where their tokens stand, 0 elsewhere; gradients go through."""
        return values.new_zeros(shape).index_put((self.row, self.column), values)


def packed_rows(input_ids: Tensor, attention_mask: Tensor, completion: int, budget: int, model: Any) -> Iterator[Rows]:
    """The rows in passes of at most `budget` packed tokens.

    input_ids, attention_mask: [B, P + C], prompts padded on the left and completions on the right. completion: C.
    A row whose completion is masked throughout is in no pass.
    """
    prompts, lengths = _ids(input_ids, attention_mask, completion)
    places: dict[tuple[int, ...], list[int]] = {}
    for row, (prompt, response) in enumerate(zip(prompts, lengths, strict=True)):
        if response:
            places.setdefault(prompt, []).append(row)
    groups = [GroupTokens(prompt, tuple(lengths[row] for row in rows)) for prompt, rows in places.items()]
    if not groups:
        return
    rows_of = list(places.values())
    for parts in micro_batches(groups, budget, cost_of(model), teacher=False):
        mine = [rows_of[part.group][i] for part in parts for i in part.responses]
        counts = [len(lengths[row]) for row in mine]
        batch = GroupedBatch.of(select(groups, parts), last_tokens=False, device=input_ids.device)
        row_of = torch.tensor(mine, device=input_ids.device)
        columns = torch.cat([torch.arange(count) for count in counts]).to(input_ids.device)
        repeated = row_of.repeat_interleave(torch.tensor(counts, device=input_ids.device), output_size=sum(counts))
        yield Rows(batch, repeated, columns, tuple(counts), row_of)


def _ids(
    input_ids: Tensor, attention_mask: Tensor, completion: int
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """(prompt, completion) of every row, without padding."""
    begin = input_ids.shape[1] - completion
    prompts, responses = [], []
    for ids, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True):
        prompts.append(tuple(i for i, seen in zip(ids[:begin], mask[:begin], strict=True) if seen))
        responses.append(tuple(i for i, seen in zip(ids[begin:], mask[begin:], strict=True) if seen))
    return prompts, responses


def use_packed_rows(model: PreTrainedModel, *, fuse: bool) -> None:
    """Lets `model(packed=batch, head=head)` give what `head` makes of a packed batch; other calls are as they were.

    Through forward(), so that wrappers (DistributedDataParallel, autocast) see it. fuse: norms, MLPs, linear layers and
    the rotation by gadcore's functions.
    """
    use_packed_attention(model)
    if fuse:
        fuse_backbone(model)
    prune_last_layer(model)
    before = model.forward

    # generate() checks its arguments against the model's own signature.
    @functools.wraps(type(model).forward)
    def forward(
        self: PreTrainedModel, *args: Any, packed: GroupedBatch | None = None, head: Head | None = None, **kwargs: Any
    ) -> Any:
        if packed is None or head is None:
            return before(*args, **kwargs)
        hidden = predicting_states(self, packed)
        output = self.get_output_embeddings()
        return head(hidden, output.weight, output.bias)

    model.forward = MethodType(forward, model)
