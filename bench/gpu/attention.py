"""Stage 3, attention: packed groups forward and backward, beside SDPA and FlashAttention on repeated prompts.

The others see every response behind a prompt of its own: that is what is computed without packing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.place import Place, Row, attempt, gate, installed, missing
from bench.runner import Rounds, Side, interleave
from gadcore.kernels.layout import PrefixLayout
from gadcore.kernels.prefix_attention import prefix_attention

# (tokens of the prompt, of a response), 8 responses; Qwen2.5-3B's heads.
LENGTHS = ((300, 400), (2048, 1536))
SAMPLES, HEADS, KV_HEADS, WIDTH = 8, 16, 2, 128
TOLERANCE = 2e-2


@dataclass(frozen=True)
class Problem:
    """query, grad: [T, Hq, D]; key, value: [T, Hk, D], packed: the prompt, then the responses."""

    prompt: int
    response: int
    samples: int
    query: Tensor
    key: Tensor
    value: Tensor
    grad: Tensor

    @classmethod
    def random(cls, prompt: int, response: int, samples: int, heads: tuple[int, int, int], place: Place) -> Problem:
        query, key, width = heads
        source = torch.Generator(place.device).manual_seed(0)
        dtype = torch.bfloat16 if place.on_gpu else torch.float32
        sizes = [(prompt + samples * response, n, width) for n in (query, key, key, query)]
        tensors = [torch.randn(size, generator=source, device=place.device).to(dtype) for size in sizes]
        return cls(prompt, response, samples, *tensors)

    @property
    def pairs(self) -> int:
        """(query, key) pairs of the packed group."""
        p, r = self.prompt, self.response
        return p * (p + 1) // 2 + self.samples * (r * p + r * (r + 1) // 2)

    def rows_of(self, sample: int) -> Tensor:
        """Places of a sample's tokens behind the prompt's."""
        first = self.prompt + sample * self.response
        device = self.query.device
        return torch.cat(
            [torch.arange(self.prompt, device=device), torch.arange(first, first + self.response, device=device)]
        )

    def upstream(self, sample: int) -> Tensor:
        """The gradient of a sample's outputs; the prompt's counts with the first sample alone."""
        grad = self.grad[self.rows_of(sample)].clone()
        if sample:
            grad[: self.prompt] = 0
        return grad


Outputs = dict[str, Tensor]


def rows(place: Place) -> Iterator[Row]:
    heads = (4, 2, 64) if place.tiny else (HEADS, KV_HEADS, WIDTH)
    for prompt, response in ((12, 6),) if place.tiny else LENGTHS:
        samples = 3 if place.tiny else SAMPLES
        problem = Problem.random(prompt, response, samples, heads, place)
        expected = truth(problem)
        for name, make in SIDES.items():
            case = f"{name}, {prompt} + {samples} x {response}"
            if make is flash and not any(map(installed, FLASH)):
                yield missing(case, " or ".join(FLASH))
            else:
                yield attempt(case, partial(_measure, make, problem, expected, place), place)


def truth(problem: Problem) -> Outputs:
    """Results and gradients in float32, response by response."""
    leaves = [x.detach().clone().float().requires_grad_() for x in (problem.query, problem.key, problem.value)]
    out = torch.zeros_like(leaves[0])
    for sample in range(problem.samples):
        rows = problem.rows_of(sample)
        found = _sdpa(*(x[rows][None] for x in leaves))[0]
        found.backward(problem.upstream(sample).float())
        out = out.index_copy(0, rows, found.detach())
    return {"out": out.detach(), **dict(zip(("d_query", "d_key", "d_value"), (x.grad for x in leaves), strict=True))}  # type: ignore[dict-item]


def _sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of [B, T, H, D]."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


# -- the sides --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """leaves: query, key, value as the way takes them. grad: of its results. results, gradients: of the way's own
    layout, as [T, H, D] packed."""

    leaves: list[Tensor]
    forward: Callable[[], Tensor]
    grad: Tensor
    results: Callable[[Tensor], Tensor]
    gradients: Callable[[Tensor], Tensor]


def ours(problem: Problem) -> Way:
    lengths = (problem.response,) * problem.samples
    layout = PrefixLayout.of([problem.prompt], [lengths], device=problem.query.device)
    leaves = [x.detach().clone().requires_grad_() for x in (problem.query, problem.key, problem.value)]
    return Way(leaves, lambda: prefix_attention(*leaves, layout), problem.grad, _as_it_is, _as_it_is)


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _repeated(problem: Problem, attention: Callable[..., Tensor]) -> Way:
    """Every sample behind a prompt of its own, [N, P + R, H, D]: copies of a prompt's token have equal results, and
    gradients that add up."""
    every = torch.stack([problem.rows_of(i) for i in range(problem.samples)])
    leaves = [x[every].requires_grad_() for x in (problem.query, problem.key, problem.value)]
    grad, p = torch.stack([problem.upstream(i) for i in range(problem.samples)]), problem.prompt

    def results(x: Tensor) -> Tensor:
        return torch.cat([x[0, :p], x[:, p:].flatten(0, 1)])

    def gradients(x: Tensor) -> Tensor:
        return torch.cat([x[:, :p].float().sum(0).to(x.dtype), x[:, p:].flatten(0, 1)])

    return Way(leaves, lambda: attention(*leaves), grad, results, gradients)


def sdpa(problem: Problem) -> Way:
    return _repeated(problem, _sdpa)


def flash(problem: Problem) -> Way:
    """FlashAttention 3 where it is installed, else 2."""
    function = importlib.import_module(FLASH[0] if installed(FLASH[0]) else FLASH[1]).flash_attn_func

    def attention(*leaves: Tensor) -> Tensor:
        found = function(*leaves, causal=True)
        out: Tensor = found[0] if isinstance(found, tuple) else found
        return out

    return _repeated(problem, attention)


FLASH = ("flash_attn_interface", "flash_attn")
SIDES: dict[str, Callable[[Problem], Way]] = {"ours": ours, "SDPA, repeated": sdpa, "FlashAttention, repeated": flash}


def _measure(make: Callable[[Problem], Way], problem: Problem, expected: Outputs, place: Place) -> Row:
    way = make(problem)

    def clear() -> None:
        for leaf in way.leaves:
            leaf.grad = None

    def both() -> dict[str, Tensor]:
        way.forward().backward(way.grad)
        return {}

    def forward() -> dict[str, Tensor]:
        with torch.no_grad():
            way.forward()
        return {}

    out = way.forward()
    out.backward(way.grad)
    gradients = [way.gradients(leaf.grad) for leaf in way.leaves if leaf.grad is not None]
    found = dict(zip(expected, [way.results(out.detach()), *gradients], strict=True))
    error = {name: _error(found[name], value) for name, value in expected.items()}
    clear()
    rounds = Rounds(1, 1, 0.0) if place.tiny else Rounds(5, 30, 1.5)
    runs = interleave([Side("forward", forward), Side("both", both, clear)], rounds, place.clock)
    forward_s, both_s = (sorted(runs[name])[len(runs[name]) // 2] for name in ("forward", "both"))
    # Seven products of a head's width a pair: two forward, five backward.
    flops = 2 * problem.pairs * problem.query.shape[1] * problem.query.shape[2]
    return {
        "forward_ms": forward_s * 1e3,
        "both_ms": both_s * 1e3,
        "packed_tflops_forward": 2 * flops / forward_s / 1e12,
        "packed_tflops_both": 7 * flops / both_s / 1e12,
        "error": max(error.values()),
        "worst": max(error, key=lambda name: error[name]),
        "gate": gate(all(value <= TOLERANCE for value in error.values())),
    }


def _error(found: Tensor, expected: Tensor) -> float:
    return ((found.float() - expected).norm() / expected.norm()).item()
