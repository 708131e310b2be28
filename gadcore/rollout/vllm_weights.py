"""Where the trainer's parameters lie in vLLM's, of which several are one there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gadcore.kernels.bits import row_sums
from gadcore.kernels.cast_copy import cast_copy
from gadcore.kernels.lora_linear import is_adapters
from gadcore.kernels.quantised_linear import is_part, layers_of_bits
from gadcore.rollout.weights import checksums


@dataclass(frozen=True)
class Slice:
    """A trainer parameter is rows start .. end - 1 of one of vLLM's parameters."""

    name: str
    vllm_name: str
    start: int
    end: int


class WholeWeights:
    """vLLM's parameters where it has all of every one, as the trainer has. Made while they are the directory's."""

    def __init__(self, engine_model: nn.Module, *, shared: bool) -> None:
        """shared: the trainer's parameters will be views into vLLM's."""
        self._engine_model, self._shared = engine_model, shared
        self._loaded = {name: row_sums(p) for name, p in engine_parameters(engine_model).items()}
        self._slices: list[Slice] = []

    def match(self, model: PreTrainedModel) -> None:
        """Finds the trainer's parameters in vLLM's; RuntimeError where it did not load what the trainer has."""
        self._slices = map_weights(model, self._engine_model, self._loaded)

    def update(self, source: Iterable[tuple[str, Tensor]]) -> None:
        """vLLM has the trainer's weights from here on; RuntimeError where it does not."""
        weights = self.named()
        bring([(name, tensor, weights[name]) for name, tensor in source], shared=self._shared)

    def is_view(self, name: str) -> bool:
        """Whether the trainer's parameter of that name is a view into vLLM's."""
        return self._shared

    def aliases(self) -> list[Tensor]:
        """vLLM's tensors that look at memory of the trainer's that may move."""
        return self.own() if self._shared else []

    def named(self) -> dict[str, Tensor]:
        """Under the trainer's names, no copies."""
        engine = engine_parameters(self._engine_model)
        return {s.name: engine[s.vllm_name].data[s.start : s.end] for s in self._slices}

    def own(self) -> list[Tensor]:
        """vLLM's parameters that the trainer's lie in."""
        engine = engine_parameters(self._engine_model)
        return [engine[name] for name in dict.fromkeys(s.vllm_name for s in self._slices)]


def bring(triples: Sequence[tuple[str, Tensor, Tensor]], *, shared: bool) -> None:
    """Brings the trainer's tensors into vLLM's, (name, trainer's, vLLM's); RuntimeError where they are not there then.

    shared: they are views into these.
    """
    if shared:
        if moved := [name for name, tensor, own in triples if tensor.data_ptr() != own.data_ptr()]:
            raise RuntimeError(f"trainer and vLLM no longer share the weights {moved[:3]}")
        return
    cast_copy([(tensor, own) for _, tensor, own in triples])
    expected = checksums((name, tensor.to(own.dtype)) for name, tensor, own in triples)
    if not torch.equal(checksums((name, own) for name, _, own in triples), expected):
        raise RuntimeError("vLLM's weights differ from the trainer's after an update")


def map_weights(model: PreTrainedModel, engine_model: nn.Module, loaded: Mapping[str, Tensor]) -> list[Slice]:
    """Where each trainer parameter lies inside vLLM's, in the trainer's order.

    loaded: row_sums() of vLLM's parameters while they held what the trainer's hold now (both were loaded from the same
    directory): every row is compared, to the precision of the engine's dtype, but those that the trainer keeps in few
    bits. vLLM's own values are not looked at, they may be gone. Raises RuntimeError where they do not match.
    """
    slices, engine = lay_out(model, engine_model), engine_parameters(engine_model)
    few = {f"{name}.weight" for name in layers_of_bits(model)}
    for s in slices:
        if s.name in few:
            continue
        ours = model.get_parameter(s.name).detach()
        if not torch.equal(loaded[s.vllm_name][s.start : s.end], row_sums(ours.to(engine[s.vllm_name].dtype))):
            raise RuntimeError(f"the trainer's {s.name} is not where it was looked for in vLLM's {s.vllm_name}")
    return slices


def engine_parameters(engine_model: nn.Module) -> dict[str, nn.Parameter]:
    """vLLM's parameters, under the names that they have without its LoRA layers around them."""
    return {name.replace(".base_layer.", "."): p for name, p in engine_model.named_parameters()}


def lay_out(model: PreTrainedModel, engine_model: nn.Module) -> list[Slice]:
    """map_weights() by names and rows alone. Adapters have no place there: they are no part of vLLM's parameters."""
    parts = {part: fused for fused, ps in getattr(engine_model, "packed_modules_mapping", {}).items() for part in ps}
    members = {fused: list(ps) for fused, ps in getattr(engine_model, "packed_modules_mapping", {}).items()}
    engine = engine_parameters(engine_model)
    ours = {name: p for name, p in model.named_parameters() if not is_adapters(name) and not is_part(name)}
    called = {name: name if name in engine else _in_vllms_words(name, model) for name in ours}
    rows = {called[name]: len(p) for name, p in ours.items()}
    slices = []
    for name, p in ours.items():
        vllm_name, start = called[name], 0
        if vllm_name not in engine:
            prefix, module, kind = _split(vllm_name)
            fused = ".".join(filter(None, (prefix, parts.get(module), kind)))
            if module not in parts or fused not in engine:
                raise RuntimeError(f"vLLM's model has no parameter for the trainer's {name}")
            before = members[parts[module]][: members[parts[module]].index(module)]
            vllm_name, start = fused, sum(rows[".".join(filter(None, (prefix, m, kind)))] for m in before)
        slices.append(Slice(name, vllm_name, start, start + len(p)))
    # Weights that no update would reach, for example a head of its own where the trainer's is the embedding.
    if left := sorted(engine.keys() - {s.vllm_name for s in slices}):
        raise RuntimeError(f"vLLM's {left[0]} is no parameter of the trainer's")
    return slices


def _in_vllms_words(name: str, model: PreTrainedModel) -> str:
    """A parameter's name where backbone and output head are called `model` and `lm_head`, as vLLM calls them."""
    backbone, head = f"{model.base_model_prefix}.", model.get_output_embeddings()
    if name.startswith(backbone):
        return "model." + name.removeprefix(backbone)
    of_head = next((f"{n}." for n, module in model.named_modules() if module is head), backbone)
    return "lm_head." + name.removeprefix(of_head) if name.startswith(of_head) else name


def _split(name: str) -> tuple[str, str, str]:
    """'a.b.q_proj.weight' -> ('a.b', 'q_proj', 'weight')."""
    prefix, _, kind = name.rpartition(".")
    prefix, _, module = prefix.rpartition(".")
    return prefix, module, kind
