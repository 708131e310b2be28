"""Master weights in the host's memory: on the device a model takes less than half of what AdamW in float32 takes there.

    device   bfloat16 weights, which forward and backward compute with; gradients, summed over micro-batches in float32
    host     float32 weights and both moments, page-locked

A step brings the host's three through the device in slices: AdamW computes there in float32, what it made goes back,
and the new weights, rounded to nearest, become the device's. While a slice is computed the next one comes and the last
one leaves. The masters are those of AdamW in float32 on the same gradients, to the bit; only what the model computes
with is rounded, as autocast rounds it for every product.

Offloading optimizers of libraries keep their copy in the parameters' own dtype, so that bfloat16 weights lose what a
small learning rate adds to them, and take gradients away before they can be clipped by their global norm or summed.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from gadcore.config.settings import DiscriminatorSettings, StudentSettings
from gadcore.memory.page_locked import page_locked, unlock
from gadcore.models.optim import Optimizer

# Numbers of a slice, of weights and of each moment.
SLICE = 1 << 26
# Bytes of the device that an update takes: two slices are there at a time.
SLICES_BYTES = 2 * 3 * 4 * SLICE
# Where vectorised code is cut decides which numbers its last, scalar iterations compute: cut at multiples of this, the
# bits are those of whole tensors.
_ALIGN = 1024


class HostMaster(Optimizer):
    """AdamW over float32 masters in host memory; the model's parameters become bfloat16, their gradients float32.

    A head of one row, a discriminator's, stays float32 on the device: scores are computed in float32.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: StudentSettings | DiscriminatorSettings,
        *,
        lr: float,
        owner: str,
        slice_numbers: int = SLICE,
    ) -> None:
        """model: its parameters, float32 on one device, become the masters. slice_numbers: a multiple of 1024.

        Raises UserError where the host has not enough memory to lock.
        """
        self.owner = owner
        trained = [p for p in model.parameters() if p.requires_grad]
        self.device = trained[0].device
        self._slice = slice_numbers
        self._begin = list(accumulate((-(-p.numel() // _ALIGN) * _ALIGN for p in trained), initial=0))
        # Weights and both moments, each in one piece: a slice is three copies.
        self._host = [self._locked(f"the {owner}'s {name}") for name in ("weights", "first moments", "second moments")]
        masters, *moments = ([self._of(host, i, p.shape) for i, p in enumerate(trained)] for host in self._host)
        with torch.no_grad():
            for master, p in zip(masters, trained, strict=True):
                master.copy_(p)
                if len(p) > 1:
                    p.data = p.data.to(torch.bfloat16).contiguous()
                    p.grad_dtype = torch.float32
        super().__init__(model, settings, lr=lr, owner=owner, updated=masters)
        self._masters = dict(zip(trained, masters, strict=True))
        for master, exp_avg, exp_avg_sq in zip(masters, *moments, strict=True):
            step = torch.zeros((), dtype=torch.float32)
            self.adamw.state[master] = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}

    def _locked(self, what: str) -> Tensor:
        size = 4 * self._begin[-1]
        if self.device.type != "cuda":
            return torch.zeros(size // 4)
        host = page_locked(what, size, f"set {self.owner}.master = device")
        # It is unlocked before it goes: the process may get its addresses again for something else.
        weakref.finalize(self, unlock, host)
        return host.view(torch.float32)

    def _of(self, host: Tensor, index: int, shape: torch.Size) -> Tensor:
        return host[self._begin[index] :][: shape.numel()].view(shape)

    def allocate(self) -> None:
        """They are there from the beginning."""

    def moments(self) -> list[Tensor]:
        """None is on the device."""
        return []

    def weights(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        return {name: self._masters.get(p, p) for name, p in parameters.items()}

    @torch.no_grad()
    def weights_changed(self) -> None:
        for p, master in self._masters.items():
            p.copy_(master)

    @torch.no_grad()
    def _update(self) -> None:
        for p, master in self._masters.items():
            if p.grad is not None:
                self.adamw.state[master]["step"] += 1
        passing = _on_cuda(self._host, self._slice, self.device) if self.device.type == "cuda" else self._there()
        for first, slices in passing:
            self._update_slice(first, *slices)
        for p in self.parameters:
            p.grad = None

    def _there(self) -> Iterator[tuple[int, Sequence[Tensor]]]:
        """On a CPU nothing has to be moved."""
        for first in range(0, len(self._host[0]), self._slice):
            yield first, [host[first : first + self._slice] for host in self._host]

    def _update_slice(self, first: int, weights: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        """AdamW for the numbers from `first` on, and the device's weights from its result."""
        pieces: list[tuple[Tensor, ...]] = []
        targets, steps = [], []
        for begin, (p, master) in zip(self._begin, self._masters.items(), strict=False):
            start, end = max(first, begin), min(first + len(weights), begin + p.numel())
            if start < end and p.grad is not None:
                inside, own = slice(start - first, end - first), slice(start - begin, end - begin)
                pieces.append((weights[inside], p.grad.view(-1)[own], exp_avg[inside], exp_avg_sq[inside]))
                targets.append(p.detach().view(-1)[own])
                # adamw() counts the step that is being made.
                steps.append(float(self.adamw.state[master]["step"]) - 1)
        if not pieces:
            return
        updated, gradients, first_moments, second_moments = (list(part) for part in zip(*pieces, strict=True))
        (group,) = self.adamw.param_groups
        beta1, beta2 = group["betas"]
        adamw(
            updated,
            gradients,
            first_moments,
            second_moments,
            [],
            list(torch.tensor(steps, device=weights.device).unbind()),
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        torch._foreach_copy_(targets, updated)


def _on_cuda(host: Sequence[Tensor], numbers: int, device: torch.device) -> Iterator[tuple[int, Sequence[Tensor]]]:
    """(first number, slices on the device) of tensors in host memory, which get what is made of the slices.

    Copies run on streams of their own, two slices are on the device at a time. At the end everything is back.
    """
    total = len(host[0])
    load, store, main = torch.cuda.Stream(device), torch.cuda.Stream(device), torch.cuda.current_stream(device)
    there = torch.empty(2, len(host), min(numbers, total), device=device)
    # Others may still use memory that the allocator has just given.
    load.wait_stream(main)
    stored: list[torch.cuda.Event | None] = [None, None]

    def fetch(index: int) -> tuple[list[Tensor], torch.cuda.Event]:
        first, place = index * numbers, index % 2
        slices = [row[: total - first] for row in there[place]]
        with torch.cuda.stream(load):
            if (event := stored[place]) is not None:
                load.wait_event(event)
            for target, source in zip(slices, host, strict=True):
                target.copy_(source[first : first + numbers], non_blocking=True)
            return slices, load.record_event()

    count = -(-total // numbers)
    coming = fetch(0)
    for index in range(count):
        slices, loaded = coming
        if index + 1 < count:
            coming = fetch(index + 1)
        main.wait_event(loaded)
        yield index * numbers, slices
        store.wait_stream(main)
        with torch.cuda.stream(store):
            for source, target in zip(slices, host, strict=True):
                target[index * numbers :][:numbers].copy_(source, non_blocking=True)
            stored[index % 2] = store.record_event()
    # The host may read it now, and the slices' memory may be given away.
    store.synchronize()
