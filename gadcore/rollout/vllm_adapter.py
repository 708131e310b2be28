"""The student's adapter inside vLLM: A and B lie where vLLM computes with them, and an update writes there.

On a CPU they are part of the product that gadcore gives vLLM's linear layers (`cpu_linear`), so that all that computes
with these layers computes with the adapter; the trainer's own A and B are views into them where weights are shared. On
CUDA they are vLLM's own (`enable_lora`), in the one slot that it has: its graphs and kernels know where that is. A base
that the trainer keeps in few bits vLLM has as plain matrices, a copy of its own: those that the trainer computes with.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gadcore.errors import UserError
from gadcore.kernels.cpu.linear_few_rows import Adapters, Product, beside
from gadcore.kernels.lora_linear import DOWN, UP, LoRALinear, is_adapters
from gadcore.kernels.quantised_linear import layers_of_bits, plain_weight
from gadcore.rollout.vllm_weights import Slice, WholeWeights, bring, engine_parameters, lay_out

# What rounding to 4 bits moves signed sums of rows by, relative to their norm, is .1; another weight's are 1.4 away.
_ROUNDING = 0.3
# Of weights that are made of few bits for an update.
AT_ONCE_BYTES = 256 << 20
# max_lora_rank of vLLM (config/lora.py).
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


class Adapter(Protocol):
    """The adapter as the engine has it.

    request: what a prompt has to come with. shared: where the engine's weights are the trainer's own, A and B are, too.
    """

    request: Any
    shared: bool

    def weights(self) -> dict[str, Tensor]:
        """A and B that the engine computes with, under the trainer's names (no copies)."""

    def as_held(self, name: str, tensor: Tensor) -> Tensor:
        """What weights() has for the trainer's tensor of that name."""

    def aliases(self) -> list[Tensor]:
        """The engine's own tensors that look at the trainer's."""

    def renew(self) -> None:
        """Before an update: what the engine has beside A and B, and may have lost in its sleep, is as it must be."""


def has_adapter(model: nn.Module) -> bool:
    return any(isinstance(module, LoRALinear) for module in model.modules())


class _Part(NamedTuple):
    """An adapted layer of the trainer's that is rows start .. end - 1 of one of vLLM's, its `place`th member."""

    name: str
    layer: LoRALinear
    start: int
    end: int
    place: int


def _parts(model: PreTrainedModel, slices: Sequence[Slice]) -> dict[str, list[_Part]]:
    """vLLM's layer -> those of the trainer's in it that have an adapter, in order."""
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    found: dict[str, list[_Part]] = {}
    members: dict[str, int] = {}
    for piece in sorted(slices, key=lambda s: (s.vllm_name, s.start)):
        name, _, kind = piece.name.rpartition(".")
        if kind != "weight":
            continue
        place = members.get(piece.vllm_name, 0)
        members[piece.vllm_name] = place + 1
        if name in adapted:
            layer = piece.vllm_name.removesuffix(".weight")
            found.setdefault(layer, []).append(_Part(name, adapted[name], piece.start, piece.end, place))
    if len(adapted) != sum(map(len, found.values())):
        raise RuntimeError("an adapter of the trainer's stands beside no layer of vLLM's")
    return found


class AdaptedProduct:
    """The product of a layer of vLLM's with its weight, and with the adapters of the trainer's layers in it."""

    def __init__(self, base: Product, parts: Sequence[_Part], weight: Tensor) -> None:
        """base: the product without. weight: vLLM's, in whose dtype A and B are here."""
        dtype = weight.dtype
        # One product for all members: A of q, k and v is one matrix.
        self.adapters = Adapters(
            torch.cat([part.layer.lora_A.detach().to(dtype) for part in parts]),
            [part.layer.lora_B.detach().to(dtype, copy=True) for part in parts],
            [part.start for part in parts],
            parts[0].layer.scale,
        )
        self._product = beside(base, self.adapters)
        self._names = [part.name for part in parts]

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._product(x, weight, bias)

    def aliases(self) -> list[Tensor]:
        """All that is read of them."""
        return [self.adapters.down, *self.adapters.ups]

    def weights(self) -> dict[str, Tensor]:
        ups = self.adapters.ups
        downs = self.adapters.down.split([b.shape[1] for b in ups])
        found: dict[str, Tensor] = {}
        for name, a, b in zip(self._names, downs, ups, strict=True):
            found |= {f"{name}.{DOWN}": a, f"{name}.{UP}": b}
        return found


class AdapterInProducts:
    """On a CPU. Made before anything looks at the products of vLLM's layers (gadcore.cpu.adapt_vllm)."""

    request = None
    shared = True

    def __init__(self, model: PreTrainedModel, engine_model: nn.Module, slices: Sequence[Slice]) -> None:
        self._products: list[AdaptedProduct] = []
        for name, parts in _parts(model, slices).items():
            layer: Any = engine_model.get_submodule(name)
            if not callable(getattr(layer, "cpu_linear", None)):
                raise RuntimeError(f"vLLM's {name} ({type(layer).__name__}) has no product that an adapter could join")
            layer.cpu_linear = AdaptedProduct(layer.cpu_linear, parts, layer.weight)
            self._products.append(layer.cpu_linear)

    def weights(self) -> dict[str, Tensor]:
        return {name: tensor for product in self._products for name, tensor in product.weights().items()}

    def as_held(self, name: str, tensor: Tensor) -> Tensor:
        return tensor

    def aliases(self) -> list[Tensor]:
        return [tensor for product in self._products for tensor in product.aliases()]

    def renew(self) -> None:
        # Nothing: it is none of what sleeps.
        return


class AdapterInSlot:
    """On CUDA: vLLM's own LoRA layers, whose one slot is written in place. No adapter is ever in a file.

    Made while vLLM's weights are awake; it computes with the adapter from the first update on.
    """

    shared = False

    def __init__(self, llm: Any, model: PreTrainedModel, slices: Sequence[Slice]) -> None:
        from vllm.lora.request import LoRARequest

        self.request = LoRARequest("student", 1, "of-this-process")
        self._parts = _parts(model, slices)
        first = next(iter(self._parts.values()))[0].layer
        self._scale, rank = first.scale, first.rank
        (runner,) = llm.collective_rpc(lambda worker: worker.model_runner)
        manager = runner.lora_manager
        # Of zeros, without a file; from then on it is there, and vLLM never looks for it.
        manager.add_dummy_lora(self.request, rank=rank)
        manager._adapter_manager.activate_adapter(self.request.lora_int_id)
        self._layers: Mapping[str, Any] = manager._adapter_manager.modules
        if missing := sorted(self._parts.keys() - self._layers.keys()):
            raise RuntimeError(f"vLLM has no adapter for {missing[0]}, whose trainer's layers have some")
        if self.request.lora_int_id not in manager.list_adapters():
            raise RuntimeError("vLLM did not take the adapter")
        self._manager = manager._adapter_manager

    @torch.no_grad()
    def renew(self) -> None:
        # The slot is as wide as one of vLLM's ranks and has places for every member of a fused layer, and vLLM
        # multiplies by all of it. It lies in the memory of the weights, which sleep level 2 gives back, and so does the
        # table of which tokens have the adapter, which is written only where it is another one than the last.
        for layer in self._layers.values():
            for stacked in (*layer.lora_a_stacked, *layer.lora_b_stacked):
                stacked.zero_()
        self._manager._last_mapping = None

    def weights(self) -> dict[str, Tensor]:
        found = {}
        for name, parts in self._parts.items():
            layer = self._layers[name]
            for part in parts:
                a, b = layer.lora_a_stacked[part.place][0, 0], layer.lora_b_stacked[part.place][0, 0]
                found[f"{part.name}.{DOWN}"] = a[: part.layer.rank, : part.layer.in_features]
                found[f"{part.name}.{UP}"] = b[: part.layer.out_features, : part.layer.rank]
        return found

    def aliases(self) -> list[Tensor]:
        return []

    def as_held(self, name: str, tensor: Tensor) -> Tensor:
        # vLLM's kernels know no scale: it is part of B, exactly where it is a power of two.
        return tensor * self._scale if is_adapters(name) and name.endswith(UP) else tensor


def in_slots(on_cpu: bool) -> bool:
    """Whether an adapter is in vLLM's own LoRA layers: elsewhere than on a CPU, where these are many times slower."""
    return not on_cpu


def install_adapter(llm: Any, model: PreTrainedModel, engine_model: nn.Module, *, slots: bool) -> Adapter:
    """Gives vLLM a place for the model's adapters. slots: it was started with lora_arguments()."""
    slices = lay_out(model, engine_model)
    return AdapterInSlot(llm, model, slices) if slots else AdapterInProducts(model, engine_model, slices)


def _signed_sums(weight: Tensor) -> Tensor:
    """[rows] float32, of a matrix whose columns have signs by their places."""
    signs = torch.randint(2, (weight.shape[1],), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return (weight.detach() @ signs.to(weight)).float()


class AdaptedWeights(WholeWeights):
    """vLLM's parameters, and the adapters beside them."""

    def __init__(
        self, engine_model: nn.Module, adapter: Adapter | None, *, shared: bool, few: Collection[str] = ()
    ) -> None:
        """adapter: may be set later, before match(). few: the trainer's layers that keep their weights in few bits."""
        super().__init__(engine_model, shared=shared)
        self.adapter, self._few = adapter, few
        engine = engine_parameters(engine_model) if few else {}
        self._signed = {name: _signed_sums(p) for name, p in engine.items() if p.dim() == 2}

    def match(self, model: PreTrainedModel) -> None:
        """As of WholeWeights. Of what the trainer keeps in few bits a sum over every row is compared, with signs that
        make it another one of another row: rounding moves it a little."""
        super().match(model)
        places = {piece.name: piece for piece in self._slices}
        for layer, module in layers_of_bits(model).items():
            piece = places[f"{layer}.weight"]
            loaded = self._signed[piece.vllm_name][piece.start : piece.end]
            if not bool(((_signed_sums(plain_weight(module)) - loaded).norm() <= _ROUNDING * loaded.norm()).item()):
                raise RuntimeError(f"the trainer's {piece.name} is not where it was looked for in vLLM's weights")

    def update(self, source: Iterable[tuple[str, Tensor]]) -> None:
        adapters: dict[str, Tensor] = {}
        plain: dict[str, Tensor] = {}
        made = 0
        for name, tensor in source:
            (adapters if is_adapters(name) else plain)[name] = tensor
            # Made on the way, of few bits: there is no room for all of them at once.
            made += tensor.nbytes if name.removesuffix(".weight") in self._few else 0
            if made > AT_ONCE_BYTES:
                super().update(plain.items())
                plain, made = {}, 0
        adapter = self._there
        held = adapter.weights()
        if missing := sorted(held.keys() ^ adapters.keys()):
            raise RuntimeError(f"the source has not the adapters that vLLM computes with: {missing[0]}")
        super().update(plain.items())
        adapter.renew()
        triples = [(name, adapter.as_held(name, tensor), held[name]) for name, tensor in adapters.items()]
        bring(triples, shared=self._shared and adapter.shared)

    @property
    def _there(self) -> Adapter:
        assert self.adapter is not None
        return self.adapter

    def is_view(self, name: str) -> bool:
        return self._shared and (self._there.shared or not is_adapters(name))

    def aliases(self) -> list[Tensor]:
        # What lies under an adapter stays where it is.
        return self._there.aliases() if self._shared else []

    def named(self) -> dict[str, Tensor]:
        return super().named() | self._there.weights()


def lora_arguments(model: PreTrainedModel) -> dict[str, Any]:
    """What vLLM is started with, so that it has a slot for the model's adapters. UserError for too large a rank."""
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    rank = max(layer.rank for layer in adapted.values())
    if rank > _RANKS[-1]:
        raise UserError(f"vLLM takes adapters of rank {_RANKS[-1]} at most: lower student.adapter_rank = {rank}")
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": next(size for size in _RANKS if size >= rank),
        "lora_target_modules": sorted({name.rpartition(".")[2] for name in adapted}),
    }
