"""What of a model a run trains, and what lies frozen under it: all of it and nothing, or adapters on a base."""

from __future__ import annotations

from dataclasses import dataclass

from gadcore.config.adapter import Adaptable, LoRA, lora_of
from gadcore.config.kinds import Trained
from gadcore.kernels.quantised import quantised_bytes
from gadcore.models.peft_format import resolved
from gadcore.plan.dimensions import Dimensions

ITEM = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Precision:
    """Bytes of a number: of the weights that the device computes with, of their gradients, of what products read.

    autocast: products read casts of wider weights. host: float32 masters and their moments lie in host memory.
    """

    weights: int
    gradients: int
    products: int
    autocast: bool
    host: bool

    @classmethod
    def of(cls, settings: Trained) -> Precision:
        weights = ITEM[settings.weights_dtype]
        narrower = settings.autocast != "none" and weights > 2
        return cls(weights, ITEM[settings.dtype], 2 if narrower else weights, narrower, settings.master == "host")


@dataclass(frozen=True)
class Role:
    """trained: entries that have gradients and moments. item: bytes of each of them, and of each moment. frozen: bytes
    of the base under adapters, 0 where all is trained. few: entries of it that are kept in few bits, and
    made whole for a product; made: of the largest matrix among them."""

    trained: int
    item: int
    frozen: int = 0
    few: int = 0
    made: int = 0

    @property
    def adapted(self) -> bool:
        return self.frozen > 0


def role_of(d: Dimensions, settings: Adaptable, owner: str, parameters: int) -> Role:
    """owner: "student" or "discriminator"; parameters: of the whole model."""
    lora = resolved(lora_of(settings), settings, owner)
    if lora is None:
        return Role(parameters, ITEM[settings.weights_dtype])
    head = d.hidden if owner == "discriminator" else 0
    few, made, kept = 0, 0, 0
    if settings.adapter_base != "none":
        sizes = [rows * columns for rows, columns in d.linears.values()]
        few, made = d.layers * sum(sizes), max(sizes)
        kept = d.layers * sum(quantised_bytes(settings.adapter_base, *shape) for shape in d.linears.values())
    frozen = (parameters - head - few) * ITEM[settings.weights_dtype] + kept
    return Role(adapter_entries(d, lora) + head, ITEM[settings.dtype], frozen, few, made)


def adapter_entries(d: Dimensions, lora: LoRA) -> int:
    """Entries of A and B beside all target layers."""
    each = {name: lora.rank * (rows + columns) for name, (rows, columns) in d.linears.items()}
    if lora.start is not None:
        # Its layers one by one.
        return sum(each.get(name.rpartition(".")[2], 0) for name in lora.targets)
    chosen = [n for n in each if not lora.targets or any(t.rpartition(".")[2] == n for t in lora.targets)]
    return d.layers * sum(each[name] for name in chosen)


def reference_bytes(d: Dimensions, precision: Precision) -> float:
    """Bytes of the reference policy: matrices as the products read them, the rest as the student's weights."""
    matrices = d.layers * d.matrices + (0 if d.tied else d.head)
    return float(matrices * precision.products + (d.parameters - matrices) * precision.weights)
