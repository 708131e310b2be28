"""The settings of low-rank adapters (LoRA): frozen weights, and small matrices beside them that are trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from gadcore.config.kinds import Above, Location, Positive, Trained

ALL_LINEAR = "all-linear"
RANK = 16


class Adaptable(Trained):
    """Of a model that is trained as a whole, or by an adapter."""

    adapter: Literal["none", "lora"] = Field(
        "none",
        description="lora: the model's weights stay as they are, and low-rank matrices beside them are trained.",
    )
    adapter_rank: Positive | None = Field(None, description="Of every adapter; none: 16, or that of adapter_from.")
    adapter_alpha: Above | None = Field(
        None,
        description="An adapter is scaled by alpha / rank; none: twice the rank, or that of adapter_from.",
    )
    adapter_targets: str | None = Field(
        None,
        description='Which linear layers have one: names as q_proj,v_proj, or "all-linear", all of the decoder layers; '
        "none: all of them, or those of adapter_from.",
    )
    adapter_rslora: bool | None = Field(
        None, description="Scale by alpha / sqrt(rank) instead (rsLoRA); none: do not, or as adapter_from does."
    )
    adapter_base: Literal["none", "int8", "nf4"] = Field(
        "none",
        description="In what the frozen matrices of the decoder layers are kept: none: as they are; int8: 8 bits, a "
        "scale for every row; nf4: 4 bits, as QLoRA keeps them.",
    )
    adapter_from: Location | None = Field(
        None, description="Folder of an adapter to start from, in the format of the package peft; none: from zero."
    )


@dataclass(frozen=True)
class LoRA:
    """What an adapter is. targets: names of linear layers, or () for all of the decoder layers. start: the folder that
    its first values are read from, None for an adapter that changes nothing yet."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = ()
    rslora: bool = False
    start: str | None = None

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def exact(self) -> bool:
        """Whether the scale is a power of two: it can be made part of B in any dtype without rounding."""
        return math.frexp(self.scale)[0] == 0.5


def lora_of(settings: Adaptable) -> LoRA | None:
    """The adapter that settings of a model ask for, its folder aside; None: all weights are trained."""
    if settings.adapter == "none":
        return None
    rank = settings.adapter_rank or RANK
    targets = settings.adapter_targets or ALL_LINEAR
    return LoRA(
        rank=rank,
        alpha=settings.adapter_alpha or 2.0 * rank,
        targets=() if targets == ALL_LINEAR else tuple(name.strip() for name in targets.split(",")),
        rslora=bool(settings.adapter_rslora),
        start=settings.adapter_from,
    )


def check_adapter(name: str, settings: Adaptable) -> None:
    """Raises ValueError for settings of an adapter that contradict each other. name: of their section."""
    keys = ("rank", "alpha", "targets", "rslora", "from")
    chosen = [f"{name}.adapter_{key}" for key in keys if getattr(settings, f"adapter_{key}") is not None]
    chosen += [f"{name}.adapter_base"] * (settings.adapter_base != "none")
    if settings.adapter == "none":
        if chosen:
            raise ValueError(
                f"{' and '.join(chosen)} say what an adapter is, and {name}.adapter = none asks for none: set "
                f"{name}.adapter = lora, or leave them out"
            )
        return
    if settings.master == "host":
        raise ValueError(
            f"{name}.master = host keeps masters of all weights in host memory, with {name}.adapter = lora hardly any "
            "are trained: leave one of them out"
        )
    targets = settings.adapter_targets
    if targets is not None and not all(part.strip() for part in targets.split(",")):
        raise ValueError(f'{name}.adapter_targets must be "all-linear" or names as q_proj,v_proj, is {targets!r}')


def check_sampler(settings: Adaptable, engine: str, dtype: str, tensor_parallel: int = 1) -> None:
    """Raises ValueError where rollout.engine, with that rollout.dtype and rollout.tensor_parallel, cannot sample from
    the student's adapter."""
    lora = lora_of(settings)
    if lora is None:
        return
    if engine == "vllm-server":
        raise ValueError(
            "rollout.engine = vllm-server gets whole weights, and student.adapter = lora changes none of them: set "
            'rollout.engine = "vllm"'
        )
    if tensor_parallel > 1:
        raise ValueError(
            f"rollout.tensor_parallel = {tensor_parallel} cuts one sampler's weights over processes, and with "
            "student.adapter = lora each of these has all weights and a sampler of its own: set "
            "rollout.tensor_parallel = 1"
        )
    # That of a folder is read with it.
    if engine == "vllm" and dtype == "bfloat16" and lora.start is None and not lora.exact:
        raise ValueError(
            f"vLLM makes the scale of student.adapter ({lora.scale:g}) part of B, which rounds in bfloat16 where it is "
            "no power of two: choose student.adapter_alpha so that it is one, for example twice the rank"
        )
