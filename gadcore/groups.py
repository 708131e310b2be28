"""Groups: the unit that everything in gadcore computes on.

One group is a prompt x, the teacher's response y_t and N student samples y_s^1..y_s^N. The student's rows are
[x | y_s^i], the discriminator's rows are [x | y_t], [x | y_s^1], .., [x | y_s^N].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """A prompt, rendered by the chat template up to and including the assistant header.

    index: position of the row in its data set, the stable name of the prompt.
    messages: the conversation, ({"role": .., "content": ..}, ..), without the response.
    token_ids: the rendered prompt in the student's vocabulary.
    """

    index: int
    messages: tuple[dict[str, str], ...]
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Response:
    """A response, by the teacher or by the student.

    text: without the end marker.
    token_ids: in the student's vocabulary, the end marker included when `finished`.
    finished: True where the response ended by itself, False where a limit cut it.
    logprobs: the sampler's log-probability of every token under softmax(logits / T); empty for the teacher.
    """

    text: str
    token_ids: tuple[int, ...]
    finished: bool
    logprobs: tuple[float, ...] = ()


@dataclass
class Group:
    """A prompt with the teacher's response and the student's samples (empty until they are drawn)."""

    prompt: Prompt
    teacher: Response
    samples: list[Response] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """One sequence for one forward pass: prompt tokens, then response tokens (at least one of each)."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True)
class RowBatch:
    """Rows padded on the right to one rectangle.

    With causal attention nothing looks to its right, so padding at the end needs no attention mask.

    input_ids: [B, L] int64.
    predict_index: [T] int64 into the flattened [B * L] positions: the position that predicts each response token.
    targets: [T] int64, the response tokens, row after row.
    last_index: [B] int64 into [B * L]: the last response token of each row.
    lengths: response tokens per row; sum(lengths) == T.
    """

    input_ids: Tensor
    predict_index: Tensor
    targets: Tensor
    last_index: Tensor
    lengths: tuple[int, ...]


def collate(rows: Sequence[Row], pad_id: int, device: torch.device | str = "cpu") -> RowBatch:
    """Pads rows into one RowBatch; `pad_id` is never attended to nor scored, any valid id will do."""
    width = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    predict, targets, last = [], [], []
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = torch.tensor(row.prompt_ids + row.response_ids)
        start = i * width + len(row.prompt_ids)
        predict.append(torch.arange(start - 1, start - 1 + len(row.response_ids)))
        targets.append(torch.tensor(row.response_ids))
        last.append(i * width + len(row) - 1)
    return RowBatch(
        input_ids.to(device),
        torch.cat(predict).to(device),
        torch.cat(targets).to(device),
        torch.tensor(last, device=device),
        tuple(len(row.response_ids) for row in rows),
    )


def micro_batches(sizes: Sequence[tuple[int, int]], token_budget: int) -> Iterator[range]:
    """Cuts consecutive items into micro-batches of at most `token_budget` padded tokens.

    sizes: (rows, longest row) per item; an item is a row or a whole group and is never split: one that is larger than
    the budget forms a micro-batch of its own. Loss and gradients do not depend on the cut, because every denominator
    is counted over the whole batch.
    """
    start, rows, longest = 0, 0, 0
    for i, (item_rows, item_longest) in enumerate(sizes):
        rows, longest = rows + item_rows, max(longest, item_longest)
        if i > start and rows * longest > token_budget:
            yield range(start, i)
            start, rows, longest = i, item_rows, item_longest
    if start < len(sizes):
        yield range(start, len(sizes))


def row_micro_batches(rows: Sequence[Row], token_budget: int) -> Iterator[list[int]]:
    """Micro-batches of rows that need no company, as indices: rows of similar length, so that little is padded."""
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
    for cut in micro_batches([(1, len(rows[i])) for i in order], token_budget):
        yield [order[i] for i in cut]
