"""What vLLM's layers do on a CPU, done with less work; installed into an engine that runs in this process.

Nothing here changes what is computed: shared prompts are computed once, and norms and activations take one pass
instead of several.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gadcore.cpu.decode_attention import share_prompts_in_decoding
from gadcore.cpu.decoder_layers import shorten_layers
from gadcore.kernels.cpu import native


def adapt(llm: Any) -> None:
    """Installs everything that is here into a vLLM that runs in this process, without graphs."""
    (model,) = llm.apply_model(lambda m: m)
    (runner,) = llm.collective_rpc(lambda worker: worker.model_runner)
    fuse_layers(model)
    shorten_layers(model)
    sample_by_one_number(runner)
    share_prompts_in_decoding(runner)
    if SharedPrefill.fits(runner, model):
        SharedPrefill(runner, model)


def fuse_layers(model: nn.Module) -> None:
    """Gives the RMS norms and SwiGLU activations of vLLM's model one pass each.

    Other layers, and other dtypes than float32, keep vLLM's own.
    """
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.layernorm import RMSNorm

    for layer in model.modules():
        # Subclasses compute something else.
        if type(layer) is RMSNorm and layer.variance_size_override is None and layer.has_weight:
            if native.available("cpu_rms_norm") and layer.weight.dtype == torch.float32:
                layer._forward_method = _rms_norm(layer)
        elif type(layer) is SiluAndMul and native.available("cpu_swiglu"):
            layer._forward_method = _silu_and_mul


def _rms_norm(layer: Any) -> Callable[..., Tensor | tuple[Tensor, Tensor]]:
    norm = torch.ops.gadcore.cpu_rms_norm.default

    def forward(x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        total = x if residual is None else x + residual
        y, _ = norm(total.reshape(-1, total.shape[-1]), layer.weight, layer.variance_epsilon, 0.0)
        y = y.view(total.shape)
        return y if residual is None else (y, total)

    return forward


def _silu_and_mul(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return torch.ops.gadcore.cpu_swiglu.default(gate, up) if x.dtype == torch.float32 else F.silu(gate) * up


class SharedPrefill:
    """Computes prompt tokens that requests of one step have in common once.

    vLLM shares full blocks of a prompt, but every sample of a group computes the prompt's last block for itself: at 8
    samples and blocks of 32, a prompt of 64 tokens costs 64 + 7 * 32. Tokens with the same text before them have the
    same hidden states, so the layers see one of them; keys, values and queries are repeated for the attention, which
    fills every request's own block.
    """

    def __init__(self, runner: Any, model: nn.Module) -> None:
        self._runner = runner
        # For every token of the step, its row among the tokens that are computed; None where all are.
        self._row_of: Tensor | None = None
        self._computed = torch.empty(0, dtype=torch.int64)
        model.register_forward_pre_hook(self._begin, with_kwargs=True)
        model.register_forward_hook(self._end)
        for layer in _attention_layers(runner):
            layer.register_forward_pre_hook(self._repeat)
            layer.register_forward_hook(self._select)

    @staticmethod
    def fits(runner: Any, model: nn.Module) -> bool:
        """Whether tokens of the model see each other in plain attention layers alone, and these are called as modules:
        those under a model of transformers' are not, and no hook of theirs would repeat what the step was given."""
        from vllm.model_executor.layers.attention import Attention
        from vllm.model_executor.models.transformers.base import Base

        return not isinstance(model, Base) and all(type(layer) is Attention for layer in _attention_layers(runner))

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._row_of = None
        tokens, positions = kwargs.get("input_ids"), kwargs.get("positions")
        if (
            args
            or tokens is None
            or positions is None
            or positions.dim() != 1
            or kwargs.get("inputs_embeds") is not None
        ):
            return None
        first = self._first_equal(len(tokens))
        if first is None:
            return None
        is_first = first == torch.arange(len(first))
        self._row_of = (is_first.cumsum(0) - 1)[first]
        self._computed = is_first.nonzero().flatten()
        return args, kwargs | {"input_ids": tokens[self._computed], "positions": positions[self._computed]}

    def _first_equal(self, count: int) -> Tensor | None:
        """[count] int64: for every token of the step, the first one with the same text up to it; None where all differ.

        Only requests that end at the same text are compared: the samples of one prompt.
        """
        batch, requests = self._runner.input_batch, self._runner.input_batch.num_reqs
        starts = self._runner.query_start_loc.np[: requests + 1].tolist()
        if starts[-1] != count or count == requests:
            return None
        begin = batch.num_computed_tokens_cpu[:requests].tolist()
        end = [begin[r] + starts[r + 1] - starts[r] for r in range(requests)]
        texts = [batch.token_ids_cpu[r, : end[r]].tobytes() for r in range(requests)]
        # The request that computes the longest part of a text computes what the others do.
        longest: dict[bytes, int] = {}
        for r in sorted(range(requests), key=lambda r: (begin[r], r)):
            longest.setdefault(texts[r], r)
        first = torch.arange(count)
        for r in range(requests):
            other = longest[texts[r]]
            shift = begin[r] - begin[other]
            first[starts[r] : starts[r + 1]] = torch.arange(starts[other] + shift, starts[other + 1])
        return None if len(longest) == requests else first

    def _repeat(self, layer: nn.Module, args: tuple[Any, ...]) -> Any:
        if self._row_of is None:
            return None
        return tuple(t[self._row_of] if isinstance(t, Tensor) else t for t in args)

    def _select(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return None if self._row_of is None else output[self._computed]

    def _end(self, model: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return None if self._row_of is None else output[self._row_of]


def _attention_layers(runner: Any) -> list[nn.Module]:
    return list(runner.vllm_config.compilation_config.static_forward_context.values())


def sample_by_one_number(runner: Any) -> None:
    """Draws every token with one random number of its request's generator, by the inverse of the distribution's sum.

    vLLM draws noise for every entry of the vocabulary, which takes longer than all other sampling together.
    """
    sampler = runner.sampler.topk_topp_sampler
    sample = torch.ops.gadcore.cpu_sample.default if native.available("cpu_sample") else None

    def forward(
        logits: Tensor, generators: dict[int, torch.Generator], k: Tensor | None, p: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if k is not None or p is not None or len(generators) != len(logits):
            return sampler.forward_cpu(logits, generators, k, p)
        numbers = torch.cat([torch.rand(1, 1, generator=generators[row]) for row in range(len(logits))])
        if sample is not None and logits.dtype == torch.float32:
            return sample(logits.contiguous(), numbers.flatten())  # type: ignore[no-any-return]
        logprobs = logits.log_softmax(-1, dtype=torch.float32)
        sums = logprobs.exp().cumsum(-1)
        whole = sums[:, -1:]
        # To the right of equal sums, and below the last: a token of probability 0 adds nothing and is never drawn.
        drawn = torch.minimum(numbers * whole, whole.nextafter(torch.zeros_like(whole)))
        return torch.searchsorted(sums, drawn, right=True).flatten(), logprobs

    sampler.forward = forward
