"""Groups, students and discriminators over the tiny models."""

from __future__ import annotations

import random

import torch
from transformers import AutoModelForSequenceClassification

from gadcore.config.settings import AlgorithmSettings, DiscriminatorSettings, StudentSettings
from gadcore.data.groups import Group, Prompt, Response
from gadcore.data.template import ChatTemplate
from gadcore.models.discriminator import Discriminator
from gadcore.models.student import Student
from tests.support.tiny import save_tiny, tiny_model, tiny_tokenizer

TEMPLATE = ChatTemplate(tiny_tokenizer())
TEXTS = ["Paris.", "It is a city on the Seine.", "Zero", "one hundred degrees", "Stop; then write a short answer."]


def response(text: str, *, finished: bool = True) -> Response:
    ids = TEMPLATE.response_ids(text, finished=finished)
    return Response(text, ids, finished, tuple(-1.0 for _ in ids))


def groups(count: int = 3, samples: int = 3, seed: int = 0, *, ragged: bool = False) -> list[Group]:
    """Groups of texts of several lengths, some of them cut; with `ragged` the number of samples varies from 2 up."""
    rng = random.Random(seed)
    made = []
    for index in range(count):
        messages = ({"role": "user", "content": " ".join(rng.choices(TEXTS, k=1 + index % 3))},)
        prompt = Prompt(index, messages, TEMPLATE.prompt_ids(messages))
        n = 2 + index % samples if ragged else samples
        drawn = [
            response(" ".join(rng.choices(TEXTS, k=rng.randint(1, 3))), finished=rng.random() < 0.7) for _ in range(n)
        ]
        made.append(Group(prompt, response(rng.choice(TEXTS)), drawn))
    return made


def student(
    dtype: torch.dtype = torch.float64,
    *,
    kind: str = "llama",
    tied: bool = True,
    kv_heads: int = 1,
    temperature: float = 0.8,
    kl_coef: float = 0.05,
    importance_cap: float | None = None,
    micro_batch_tokens: int = 10**6,
) -> Student:
    model = tiny_model(kind, tied=tied, kv_heads=kv_heads).to(dtype)
    return Student(
        exact_norms(model) if dtype == torch.float64 else model,
        StudentSettings(),
        AlgorithmSettings(kl_coef=kl_coef, importance_cap=importance_cap),
        temperature=temperature,
        micro_batch_tokens=micro_batch_tokens,
        activation_checkpointing="off",
    )


def discriminator(
    tmp_path,
    dtype: torch.dtype = torch.float64,
    *,
    kind: str = "llama",
    kv_heads: int = 1,
    micro_batch_tokens: int = 10**6,
) -> Discriminator:
    directory = tmp_path / f"{kind} {kv_heads}"
    if not directory.exists():
        save_tiny(directory, kind, kv_heads=kv_heads)
    model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=1).eval().to(dtype)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(5)
        model.score.weight.copy_(torch.randn(model.score.weight.shape, generator=generator))
    return Discriminator(
        exact_norms(model) if dtype == torch.float64 else model,
        TEMPLATE,
        DiscriminatorSettings(),
        same_vocabulary=True,
        micro_batch_tokens=micro_batch_tokens,
        activation_checkpointing="off",
    )


class _ExactNorm(torch.nn.Module):
    """An RMS norm in the dtype of its input. shifted: scales by 1 + weight, as Gemma does."""

    def __init__(self, weight: torch.nn.Parameter, eps: float, *, shifted: bool) -> None:
        super().__init__()
        self.weight, self.eps, self.shifted = weight, eps, shifted

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return normed * (1 + self.weight if self.shifted else self.weight)


def exact_norms(model):
    """Replaces norms that round to fp32 inside, as Hugging Face's do, so that an fp64 model is fp64 throughout."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if "RMSNorm" in type(child).__name__:
                eps = child.eps if hasattr(child, "eps") else child.variance_epsilon
                setattr(parent, name, _ExactNorm(child.weight, eps, shifted="Gemma" in type(child).__name__))
    return model


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual: dict, expected: dict, *, rtol: float, atol: float) -> None:
    assert actual.keys() == expected.keys() and actual
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )
