"""Groups: the unit that everything in gadcore computes on.

One group is a prompt x, the teacher's response y_t and N student samples y_s^1..y_s^N. It is packed into one row, its
prompt once: [x | y_s^1 | .. | y_s^N] for the student, [x | y_t | y_s^1 | .. | y_s^N] for the discriminator.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain

import numpy as np
import torch
from torch import Tensor

from gadcore.kernels.layout import GroupLayout, PrefixLayout, on_device


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
class GroupTokens:
    """A prompt and responses to it as token ids, at least one token each."""

    prompt: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        """Packed tokens: the prompt counts once."""
        return len(self.prompt) + sum(map(len, self.responses))

    @property
    def pairs(self) -> int:
        """(query, key) pairs of causal attention: every response sees the whole prompt and itself."""
        prompt = len(self.prompt)
        return _triangle(prompt) + sum(len(r) * prompt + _triangle(len(r)) for r in self.responses)


def _triangle(n: int) -> int:
    return n * (n + 1) // 2


@dataclass(frozen=True)
class GroupPart:
    """Responses of one group that pass through a model together, behind their prompt.

    group: position of the group in the batch. responses: positions of the responses in their group.
    """

    group: int
    responses: tuple[int, ...]


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of a model, relative to each other: per packed token, and per (query, key) pair."""

    per_token: float
    per_pair: float

    def of(self, tokens: GroupTokens) -> float:
        return self.per_token * tokens.tokens + self.per_pair * tokens.pairs


@dataclass(frozen=True)
class GroupedBatch:
    """Prompts, each with its responses behind it, packed into one row of T tokens without padding.

    Equal responses to a prompt are packed once: they cost nothing twice, and get the same results to the bit.

    input_ids: [1, T] int64. layout: who sees whom, and every token's position in its own sequence.
    predicting: [P] int64 into the T tokens, ascending: those that predict a response token.
    predicted_by: [R] int64 into `predicting`: the one that predicts each response token.
    targets: [R] int64, the response tokens, response after response.
    last_index: [U] int64 into the T tokens: the last token of each response that was packed; empty without last tokens.
    packed_as: [S] int64 into the U packed responses, for every response in order; empty without last tokens.
    lengths: tokens per response, S of them; sum(lengths) == R.
    """

    input_ids: Tensor
    layout: PrefixLayout
    predicting: Tensor
    predicted_by: Tensor
    targets: Tensor
    last_index: Tensor
    packed_as: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def of(
        cls, groups: Sequence[GroupTokens], *, last_tokens: bool, device: torch.device | str = "cpu"
    ) -> GroupedBatch:
        """Packs groups. last_tokens: whether the last token of each response is an input as well.

        For scores it is, they are read there; for log-probs nothing is predicted from it, and it costs nothing when
        it is left out.
        """
        ids: list[int] = []
        predict: list[int] = []
        last: list[int] = []
        packed_as: list[int] = []
        kept: list[list[int]] = []
        for group in groups:
            ids += group.prompt
            prompt_end = len(ids) - 1
            kept.append([])
            first: dict[tuple[int, ...], tuple[int, int]] = {}
            for response in group.responses:
                length = len(response) if last_tokens else len(response) - 1
                if response not in first:
                    first[response] = len(ids), len(last)
                    ids += response[:length]
                    if length:
                        kept[-1].append(length)
                    if last_tokens:
                        last.append(len(ids) - 1)
                begin, unique = first[response]
                predict += [prompt_end, *range(begin, begin - 1 + len(response))]
                if last_tokens:
                    packed_as.append(unique)
        # Here and not on the device, which would have to say how many they are.
        predicting, predicted_by = np.unique(np.asarray(predict, dtype=np.int64), return_inverse=True)
        batch = cls(
            torch.tensor([ids]),
            PrefixLayout.of([len(group.prompt) for group in groups], kept),
            torch.from_numpy(predicting),
            torch.from_numpy(predicted_by),
            torch.tensor([token for group in groups for r in group.responses for token in r]),
            torch.tensor(last, dtype=torch.int64),
            torch.tensor(packed_as, dtype=torch.int64),
            tuple(len(response) for group in groups for response in group.responses),
        )
        return on_device(batch, device)


def select(groups: Sequence[GroupTokens], parts: Sequence[GroupPart]) -> list[GroupTokens]:
    """The tokens of `parts`."""
    return [
        GroupTokens(groups[part.group].prompt, tuple(groups[part.group].responses[i] for i in part.responses))
        for part in parts
    ]


def micro_batches(
    groups: Sequence[GroupTokens], token_budget: int, cost: Cost, *, teacher: bool, multiple_of: int = 1
) -> list[list[GroupPart]]:
    """Cuts a batch into micro-batches of at most `token_budget` packed tokens and nearly equal cost.

    Groups stay whole where they fit; a larger one is split by responses, its prompt repeated in every part, and where
    `teacher` is set so is its first response, which every other one is compared with. A part of one response (beside
    the teacher's) that is still too large forms a micro-batch of its own. Loss and gradients do not depend on the cut,
    because every denominator is counted over the whole batch. Parts keep the order of the batch inside their
    micro-batch.

    multiple_of: the number of micro-batches is a multiple of this, some perhaps empty, for ranks that take one each.
    """
    parts = [part for g, group in enumerate(groups) for part in _split(g, group, token_budget, teacher)]
    items = list(zip(parts, select(groups, parts), strict=True))
    costs = [cost.of(tokens) for _, tokens in items]
    order = sorted(range(len(items)), key=lambda i: (-costs[i], i))
    count = _round_up(-(-sum(tokens.tokens for _, tokens in items) // token_budget), multiple_of)
    while True:
        loads, room = [0.0] * count, [token_budget] * count
        cuts: list[list[int]] = [[] for _ in range(count)]
        for i in order:
            tokens = items[i][1].tokens
            fits = [b for b in range(count) if tokens <= room[b] or not cuts[b]]
            if not fits:
                break
            lightest = min(fits, key=lambda b: (loads[b], b))
            loads[lightest] += costs[i]
            room[lightest] -= tokens
            cuts[lightest].append(i)
        else:
            return [[parts[i] for i in sorted(cut)] for cut in cuts if cut or multiple_of > 1]
        count += multiple_of


def _round_up(n: int, multiple: int) -> int:
    return max(1, -(-n // multiple)) * multiple


def _split(index: int, group: GroupTokens, token_budget: int, teacher: bool) -> list[GroupPart]:
    everything = tuple(range(len(group.responses)))
    if group.tokens <= token_budget:
        return [GroupPart(index, everything)]
    shared, rest = (everything[:1], everything[1:]) if teacher else ((), everything)
    fixed = len(group.prompt) + sum(len(group.responses[i]) for i in shared)
    parts: list[tuple[int, ...]] = []
    room: list[int] = []
    for i in rest:
        length = len(group.responses[i])
        fits = next((p for p, left in enumerate(room) if length <= left), None)
        if fits is None:
            parts.append((*shared, i))
            room.append(token_budget - fixed - length)
        else:
            parts[fits] += (i,)
            room[fits] -= length
    return [GroupPart(index, part) for part in parts or [everything]]


@dataclass(frozen=True)
class MicroBatch:
    """What passes through a model at once, and where its S sequences stand among those of the whole batch.

    sequences: layout of the S responses by group, with their tokens where these are predicted.
    index: [S] int64, places of the S responses among all of the batch, which are counted group after group.
    logprobs: [R] float32, what the sampler said of the R response tokens; empty where nobody gave any.
    idle: nothing of the batch is in it, only a group of two tokens that no result may come from: a process computes
    it for what it has to gather and to add up together with the others.
    """

    tokens: GroupedBatch
    sequences: GroupLayout
    index: Tensor
    logprobs: Tensor
    idle: bool = False


_NOBODY = GroupTokens((1,), ((1,),))


def packed(
    groups: Sequence[GroupTokens],
    token_budget: int,
    cost: Cost,
    *,
    teacher: bool,
    scored: bool | None = None,
    logprobs: Sequence[Sequence[float]] = (),
    device: torch.device | str = "cpu",
    rank: int = 0,
    size: int = 1,
) -> Iterator[MicroBatch]:
    """A batch in micro-batches, as micro_batches() cuts it, packed on `device` by one copy each.

    teacher: the first response of every group is its teacher's. scored: last tokens are inputs, where scores are read,
    and no tokens are predicted; default where there is a teacher.
    logprobs: of every token of every response of the batch, by the sampler; () for none.
    rank, size: of a process that takes its share of the whole batch's; all of them take equally many.
    """
    begin = [0, *accumulate(len(group.responses) for group in groups)]
    scored = teacher if scored is None else scored
    cuts = micro_batches(groups, token_budget, cost, teacher=teacher, multiple_of=size)
    for parts in cuts[rank::size]:
        tokens = GroupedBatch.of(select(groups, parts) or [_NOBODY], last_tokens=scored)
        sequences = GroupLayout.of(
            [len(part.responses) - teacher for part in parts] or [1 - teacher],
            teacher=teacher,
            lengths=None if scored else tokens.lengths,
        )
        index = [begin[p.group] + i for p in parts for i in p.responses]
        sampled = np.fromiter(chain.from_iterable(logprobs[i] for i in index if logprobs), dtype=np.float32)
        places = torch.tensor(index, dtype=torch.int64)
        micro = MicroBatch(tokens, sequences, places, torch.from_numpy(sampled), idle=not parts)
        yield on_device(micro, device)
