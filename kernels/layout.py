"""How groups lie in a packed row: GroupLayout for what is computed by group, PrefixLayout for what attends.

Layouts are made on the host, and go to a device as a whole: on_device().
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor

Device = torch.device | str
D = TypeVar("D")
# Where a tensor of on_device() may begin, in bytes: Triton compiles for pointers that are multiples of 16.
_ALIGNED = 128


@dataclass(frozen=True)
class GroupLayout:
    """G groups over a flat list of S sequences over a flat list of T tokens, in compressed-row style.

    A group is one prompt's responses: its teacher's, where it has one, comes first, then its samples. Groups may
    differ in size, have no teacher, or be empty; sequences may differ in length. Made by `of`.

    group_offsets: [G + 1] int64, group g owns the sequences group_offsets[g] .. group_offsets[g + 1] - 1.
    has_teacher: [G] bool.
    sequences: S, known on the host so that nothing has to wait for a GPU to learn it.
    token_offsets: [S + 1] int64, sequence s owns the tokens token_offsets[s] .. token_offsets[s + 1] - 1; None where
        only whole sequences are computed on.
    tokens: T, or None.
    """

    group_offsets: Tensor
    has_teacher: Tensor
    sequences: int
    token_offsets: Tensor | None = None
    tokens: int | None = None

    @classmethod
    def of(
        cls,
        samples: Sequence[int],
        teacher: bool | Sequence[bool],
        lengths: Sequence[int] | None = None,
        device: Device = "cpu",
    ) -> GroupLayout:
        """Layout of groups with samples[g] samples each, beside the teacher of those that have one.

        teacher: for all groups alike, or per group. lengths: tokens of every sequence, teachers included, in order.
        Raises ValueError where counts do not fit together.
        """
        teachers = [teacher] * len(samples) if isinstance(teacher, bool) else list(teacher)
        if len(teachers) != len(samples):
            raise ValueError(f"samples are given for {len(samples)} groups, teacher for {len(teachers)}")
        if any(n < 0 for n in samples):
            raise ValueError(f"samples must be 0 or more in every group, are {list(samples)}")
        group_offsets, sequences = _offsets([n + t for n, t in zip(samples, teachers, strict=True)])
        has_teacher = torch.tensor(teachers, dtype=torch.bool)
        if lengths is None:
            return on_device(cls(group_offsets, has_teacher, sequences), device)
        if len(lengths) != sequences or any(n < 0 for n in lengths):
            raise ValueError(f"lengths must hold 0 or more for each of {sequences} sequences, are {list(lengths)}")
        return on_device(cls(group_offsets, has_teacher, sequences, *_offsets(lengths)), device)

    @property
    def group_of(self) -> Tensor:
        """[S] int64, the group of every sequence."""
        return _owners(self.group_offsets, self.sequences)

    @property
    def sequence_of(self) -> Tensor:
        """[T] int64, the sequence of every token; needs token_offsets."""
        if self.token_offsets is None or self.tokens is None:
            raise ValueError("this layout knows no tokens: make it with GroupLayout.of(.., lengths=..)")
        return _owners(self.token_offsets, self.tokens)

    @property
    def is_teacher(self) -> Tensor:
        """[S] bool, True where the sequence is its group's teacher."""
        index = torch.arange(self.sequences, device=self.group_offsets.device)
        group = self.group_of
        return self.has_teacher[group] & (self.group_offsets[group] == index)

    @property
    def paired(self) -> Tensor:
        """[S] bool, True where the sequence is a sample whose group has a teacher."""
        return ~self.is_teacher & self.has_teacher[self.group_of]


@dataclass(frozen=True)
class PrefixLayout:
    """G prompts, each followed by its responses, in one row of T tokens without padding. Made by `of`.

    A segment is a prompt or a response. Prompts and responses may differ in length, prompts in the number of their
    responses.

    offsets: [K + 1] int64, segment k owns the tokens offsets[k] .. offsets[k + 1] - 1.
    prompt_of: [K] int64, the segment of k's prompt; k itself where k is a prompt.
    positions: [T] int64, the position of every token in its own sequence: those of a response go on where its prompt
        ends.
    tokens: T. longest: positions of the longest sequence, prompt and response together.
    prompts, responses: the lengths as they were given, known on the host so that nothing waits for a GPU.
    """

    offsets: Tensor
    prompt_of: Tensor
    positions: Tensor
    tokens: int
    longest: int
    prompts: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, prompts: Sequence[int], responses: Sequence[Sequence[int]], device: Device = "cpu") -> PrefixLayout:
        """Layout of prompts of prompts[g] tokens with responses of responses[g][i] tokens each.

        Raises ValueError where there is no prompt, where the counts do not fit together, or where a segment is empty.
        """
        if not prompts or len(prompts) != len(responses):
            raise ValueError(f"responses are given for {len(responses)} of {len(prompts)} prompts")
        lengths: list[int] = []
        prompt_of: list[int] = []
        positions: list[Tensor] = []
        longest = 0
        for prompt, group in zip(prompts, responses, strict=True):
            if prompt < 1 or any(length < 1 for length in group):
                raise ValueError(f"prompts and responses have 1 or more tokens, got {prompt} and {list(group)}")
            prompt_of += [len(lengths)] * (1 + len(group))
            lengths += [prompt, *group]
            positions += [torch.arange(prompt), *(torch.arange(prompt, prompt + length) for length in group)]
            longest = max(longest, prompt + max(group, default=0))
        offsets, tokens = _offsets(lengths)
        layout = cls(
            offsets,
            torch.tensor(prompt_of, dtype=torch.int64),
            torch.cat(positions),
            tokens,
            longest,
            tuple(prompts),
            tuple(map(tuple, responses)),
        )
        return on_device(layout, device)


def on_device(made: D, device: Device) -> D:
    """A dataclass of tensors on the host, and of such dataclasses, with all of its tensors on a device.

    By one copy, out of page-locked memory where the device is CUDA: the host waits for none. A tensor at a time, each
    out of ordinary memory, would make it wait as many times for everything that was queued before. The tensors share
    the memory of that copy, and are themselves where the device is the CPU.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return made
    return _sent(made, lambda host: host.to(device, non_blocking=True), pinned=device.type == "cuda")


def _sent(made: D, send: Callable[[Tensor], Tensor], *, pinned: bool) -> D:
    """The same, with its tensors in what `send` makes of one buffer that holds all of them."""
    found = list(_tensors(made))
    begins = [0, *accumulate(-(-tensor.nbytes // _ALIGNED) * _ALIGNED for tensor in found)]
    parts = [(tensor, slice(begin, begin + tensor.nbytes)) for tensor, begin in zip(found, begins, strict=False)]
    host = torch.empty(begins[-1], dtype=torch.uint8, pin_memory=pinned)
    for tensor, part in parts:
        host[part].view(tensor.dtype).copy_(tensor.flatten())
    there = send(host)
    arrived: D = _with_tensors(made, iter([there[part].view(x.dtype).view(x.shape) for x, part in parts]))
    return arrived


def _tensors(made: Any) -> Iterator[Tensor]:
    for field in fields(made):
        value = getattr(made, field.name)
        if isinstance(value, Tensor):
            yield value
        elif is_dataclass(value):
            yield from _tensors(value)


def _with_tensors(made: Any, tensors: Iterator[Tensor]) -> Any:
    """The same with other tensors, in the order of _tensors()."""
    changed: dict[str, Any] = {}
    for field in fields(made):
        value = getattr(made, field.name)
        if isinstance(value, Tensor):
            changed[field.name] = next(tensors)
        elif is_dataclass(value):
            changed[field.name] = _with_tensors(value, tensors)
    return replace(made, **changed)


def _offsets(lengths: Sequence[int]) -> tuple[Tensor, int]:
    """(where each of n neighbours of these lengths begins, and the last one ends, [n + 1] int64; their sum)."""
    offsets = [0, *accumulate(lengths)]
    return torch.tensor(offsets, dtype=torch.int64), offsets[-1]


def _owners(offsets: Tensor, items: int) -> Tensor:
    """[items] int64, of every item the neighbour that owns it."""
    rows = torch.arange(len(offsets) - 1, device=offsets.device)
    return torch.repeat_interleave(rows, offsets.diff(), output_size=items)
