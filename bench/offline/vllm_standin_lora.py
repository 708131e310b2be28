"""The LoRA path of the stand-in for vLLM: one slot for an adapter beside every target layer, and whose tokens have it.

The slot and the table of tokens lie in the memory of the weights, Worker.load_model() in v1/worker/gpu_worker.py, and
are neither parameters nor buffers: after sleep(2) nobody has kept them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

# MaxLoRARanks in config/lora.py.
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_DUMMY = 0.5


@dataclass(frozen=True)
class LoRARequest:
    """lora/request.py"""

    lora_name: str
    lora_int_id: int
    lora_path: str


class LoRALayer(nn.Module):
    """A layer with a slot: QKVParallelLinearWithLoRA and others in lora/layers/."""

    def __init__(self, base_layer: nn.Module, widths: list[int], rank: int) -> None:
        """widths: rows of each of the trainer's layers that it is made of."""
        super().__init__()
        self.base_layer, self.widths, self.active = base_layer, widths, False
        weight: Tensor = base_layer.weight  # type: ignore[assignment]
        made = dict(dtype=weight.dtype, device="cuda")
        # BaseLinearLayerWithLoRA.create_lora_weights() in lora/layers/base_linear.py
        self.lora_a_stacked = tuple(torch.zeros(1, 1, rank, weight.shape[1], **made) for _ in widths)  # type: ignore[arg-type]
        self.lora_b_stacked = tuple(torch.zeros(1, 1, width, rank, **made) for width in widths)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        if not self.active:
            return y
        # PunicaWrapperGPU.add_lora_linear() in lora/punica_wrapper/punica_gpu.py: all of the slot, whatever the
        # adapter's own rank, through a float32 buffer.
        parts = []
        for a, b in zip(self.lora_a_stacked, self.lora_b_stacked, strict=True):
            parts.append((x.float() @ a[0, 0].float().t()) @ b[0, 0].float().t())
        return y + torch.cat(parts, -1).to(y.dtype)


@dataclass
class _AdapterManager:
    """lora/model_manager.py: LoRAModelManager."""

    modules: dict[str, LoRALayer]
    registered: dict[int, int] = field(default_factory=dict)
    active: int | None = None
    _last_mapping: tuple[int, ...] | None = None

    def activate_adapter(self, lora_id: int) -> bool:
        if self.active == lora_id:
            return False
        rank = self.registered[lora_id]
        self.active = lora_id
        for layer in self.modules.values():
            for tensor in (*layer.lora_a_stacked, *layer.lora_b_stacked):
                tensor.zero_()
            for a, b in zip(layer.lora_a_stacked, layer.lora_b_stacked, strict=True):
                a[..., :rank, :].fill_(_DUMMY)
                b[..., :rank].fill_(_DUMMY)
        return True


class LoRAManager:
    """lora/worker_manager.py: LRUCacheWorkerLoRAManager, around the layers of a model."""

    def __init__(self, model: nn.Module, targets: list[str], max_loras: int, max_rank: int) -> None:
        if max_loras != 1 or max_rank not in _RANKS:
            raise ValueError(f"max_loras = {max_loras}, max_lora_rank = {max_rank}: vLLM takes the ranks {_RANKS}")
        packed: dict[str, list[str]] = model.packed_modules_mapping  # type: ignore[assignment]
        modules = {}
        for name, module in list(model.named_modules()):
            parts = packed.get(name.rpartition(".")[2], [name.rpartition(".")[2]])
            if set(parts) & set(targets):
                modules[name] = LoRALayer(module, _widths(module, parts), max_rank)
                model.set_submodule(name, modules[name])
        self._adapter_manager, self._max_rank = _AdapterManager(modules), max_rank
        # Which tokens have the adapter: written where it is another table than the last one's.
        self._table_is_there = False

    def tensors(self) -> Iterator[Tensor]:
        for layer in self._adapter_manager.modules.values():
            yield from (*layer.lora_a_stacked, *layer.lora_b_stacked)

    def add_dummy_lora(self, lora_request: LoRARequest, rank: int) -> bool:
        if lora_request.lora_int_id in self.list_adapters():
            return False
        if rank > self._max_rank:
            raise ValueError(f"rank {rank} in a slot of rank {self._max_rank}")
        self._adapter_manager.registered[lora_request.lora_int_id] = rank
        return True

    def list_adapters(self) -> set[int]:
        return set(self._adapter_manager.registered)

    def set_active_adapters(self, request: LoRARequest | None, tokens: int) -> None:
        """For a forward pass of so many tokens, all of one request."""
        manager = self._adapter_manager
        if request is not None:
            if request.lora_int_id not in manager.registered:
                # WorkerLoRAManager._load_adapter()
                raise FileNotFoundError(f"no adapter {request.lora_name} at {request.lora_path}")
            manager.activate_adapter(request.lora_int_id)
        # LoRAModelManager.set_adapter_mapping()
        mapping = (0 if request is None else request.lora_int_id,) * tokens
        if manager._last_mapping != mapping:
            manager._last_mapping, self._table_is_there = mapping, True
        if not self._table_is_there:
            raise RuntimeError("vLLM would read from memory that has slept which tokens have an adapter")
        for layer in manager.modules.values():
            layer.active = request is not None

    def sleep(self) -> None:
        self._table_is_there = False


def _widths(module: Any, parts: list[str]) -> list[int]:
    """Rows of each part."""
    return list(module.widths) if len(parts) > 1 else [len(module.weight)]
