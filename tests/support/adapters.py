"""Students and discriminators on one frozen base of a tiny model, and plain models of the same weights."""

from __future__ import annotations

import copy

import torch
from torch import nn

from gadcore.config.settings import AlgorithmSettings, DiscriminatorSettings, StudentSettings
from gadcore.kernels.quantised_linear import layers_of_bits
from gadcore.models.adapter import adapted_layers, quantise_base, whole_weight
from gadcore.models.discriminator import Discriminator
from gadcore.models.shared_base import SharedBase
from gadcore.models.student import Student
from tests.support.builders import TEMPLATE, exact_norms
from tests.support.tiny import tiny_model, tiny_tokenizer

RANK = 4


def tiny_base(
    kind: str = "llama",
    dtype: torch.dtype = torch.float64,
    *,
    kv_heads: int = 1,
    tied: bool = True,
    kept: str = "none",
):
    """kept: in what the matrices of its layers are, as adapter_base says."""
    model = tiny_model(kind, kv_heads=kv_heads, tied=tied).to(dtype)
    if dtype == torch.float64:
        exact_norms(model)
    quantise_base(model, StudentSettings(adapter="lora", adapter_base=kept), torch.device("cpu"), "student")
    return SharedBase(model, "tiny")


def trained(model, seed: int) -> None:
    """Gives the adapters values as training leaves them: at B = 0 hardly a mistake would show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            for p in (layer.lora_A, layer.lora_B):
                p.copy_(0.15 * torch.randn(p.shape, generator=generator, dtype=torch.float64))


def _double(model, dtype: torch.dtype):
    # Settings know no float64.
    for layer in adapted_layers(model).values():
        for name in ("lora_A", "lora_B"):
            setattr(layer, name, nn.Parameter(getattr(layer, name).detach().to(dtype)))
    if hasattr(model, "score"):
        model.score.to(dtype)
    return model


def on_base(
    base: SharedBase,
    *,
    dtype: torch.dtype = torch.float64,
    mode: str = "off",
    micro_batch_tokens: int = 10**6,
    kl_coef: float = 0.05,
    rank: int = RANK,
    lr: float = 1e-3,
    values: bool = True,
    targets: str | None = None,
) -> tuple[Student, Discriminator]:
    """values: adapters as trained; else new ones, whose B is zero. targets: the student's."""
    common = dict(adapter="lora", adapter_rank=rank, adapter_alpha=2.0 * rank, lr=lr, adapter_targets=targets)
    settings = StudentSettings(**common)
    policy = _double(base.policy(settings, seed=1), dtype)
    if values:
        trained(policy, 1)
    student = Student(
        policy,
        settings,
        AlgorithmSettings(kl_coef=kl_coef),
        temperature=0.8,
        micro_batch_tokens=micro_batch_tokens,
        activation_checkpointing=mode,
        tokenizer=tiny_tokenizer(),
    )
    student.base = base
    same = dict(dtype=dtype, mode=mode, micro_batch_tokens=micro_batch_tokens, rank=rank, lr=lr, values=values)
    return student, scorer_on(base, **same)


def scorer_on(
    base: SharedBase,
    *,
    dtype: torch.dtype = torch.float64,
    mode: str = "off",
    micro_batch_tokens: int = 10**6,
    rank: int = RANK,
    lr: float = 1e-3,
    values: bool = True,
) -> Discriminator:
    settings = DiscriminatorSettings(adapter="lora", adapter_rank=rank, adapter_alpha=2.0 * rank, lr=lr)
    tokenizer = tiny_tokenizer()
    model = base.scorer(settings, seed=5, end_id=TEMPLATE.end_id, tokenizer=tokenizer)
    _double(model, dtype)
    if values:
        trained(model, 2)
    return Discriminator(
        model,
        TEMPLATE,
        settings,
        same_vocabulary=True,
        micro_batch_tokens=micro_batch_tokens,
        activation_checkpointing=mode,
        tokenizer=tokenizer,
    )


def merged(model):
    """A plain model of its own whose weights are W + s B A, with a gradient for all of them."""
    plain = copy.deepcopy(model)
    for name, layer in {**layers_of_bits(plain), **adapted_layers(plain)}.items():
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        linear.weight, linear.bias = nn.Parameter(whole_weight(layer)), layer.bias
        plain.set_submodule(name, linear)
    for module in plain.modules():
        if hasattr(module, "gate_proj"):
            # It knows of the adapters: its class's own again.
            vars(module).pop("forward", None)
    return plain.requires_grad_(True)


def by_chain_rule(model, plain) -> dict[str, torch.Tensor]:
    """The gradients of A, B and a head that follow from those of the plain model's weights W' = W + s B A.

    d B = s d W' A^T        d A = s B^T d W'
    """
    found = {}
    for name, layer in adapted_layers(model).items():
        whole = plain.get_submodule(name).weight.grad
        found[f"{name}.lora_A"] = layer.scale * layer.lora_B.detach().T @ whole
        found[f"{name}.lora_B"] = layer.scale * whole @ layer.lora_A.detach().T
    if hasattr(model, "score"):
        found["score.weight"] = plain.score.weight.grad
    return found
