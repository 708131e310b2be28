"""Memory at the peak of a pass on the stand-in GPU, beside what the plan says of it.

Kernels are not run, so that models of some size take seconds: what is allocated does not depend on numbers.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from triton.runtime.interpreter import GridExecutor

from bench.offline.cuda_standin import gpu
from gadcore.config.settings import AlgorithmSettings, DiscriminatorSettings, StudentSettings
from gadcore.data.groups import Group, GroupTokens, Prompt, Response
from gadcore.models import backbone
from gadcore.models.discriminator import Discriminator
from gadcore.models.student import Student
from gadcore.plan.dimensions import read_dimensions
from gadcore.plan.memory import Choice, state_memory
from gadcore.plan.workload import Workload
from tests.support.builders import TEMPLATE
from tests.support.plan_cases import preset_case

PROMPT, RESPONSE, SAMPLES = 64, 112, 4
# Of a model small enough for a CPU's products, and wide enough that rounding to blocks does not matter.
SIZE = dict(
    vocab_size=4096, hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, max_position_embeddings=512, pad_token_id=0, tie_word_embeddings=True,
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch):
    monkeypatch.setattr(GridExecutor, "__call__", lambda *args, **kwargs: None)
    # The probes of what can be fused and pruned compare numbers.
    monkeypatch.setattr(torch, "allclose", lambda *args, **kwargs: True)
    monkeypatch.setattr(backbone, "close", lambda a, b: True)


def some_groups(count: int) -> list[Group]:
    """No two responses are equal: they would be packed once."""

    def response(number: int) -> Response:
        ids = tuple(1 + (number * 131 + i) % 4000 for i in range(RESPONSE))
        return Response("", ids, True, (-1.0,) * RESPONSE)

    prompts = [Prompt(i, ({"role": "user", "content": "x"},), tuple(range(1, 1 + PROMPT))) for i in range(count)]
    each = SAMPLES + 1
    return [
        Group(prompt, response(each * i), [response(each * i + 1 + k) for k in range(SAMPLES)])
        for i, prompt in enumerate(prompts)
    ]


def peak(model, role: str, mode: str, budget: int, groups: list[Group]) -> int:
    """Bytes of tensors on the stand-in during a pass."""
    given = dict(micro_batch_tokens=budget, activation_checkpointing=mode)
    with gpu(8 << 30, unit=16) as device:
        model = model.to("cuda")
        if role == "student":
            settings, algorithm = StudentSettings(autocast="bfloat16"), AlgorithmSettings(kl_coef=0.0)
            policy = Student(model, settings, algorithm, temperature=0.8, **given)
            torch.cuda.reset_peak_memory_stats()
            policy.grpo_backward(groups, [[1.0, 2.0, 3.0, 4.0]] * len(groups))
        else:
            judge = Discriminator(
                model, TEMPLATE, DiscriminatorSettings(autocast="bfloat16"), same_vocabulary=True, **given
            )
            texts = [[g.teacher.token_ids, *(s.token_ids for s in g.samples)] for g in groups]
            packed = [GroupTokens(g.prompt.token_ids, tuple(ids)) for g, ids in zip(groups, texts, strict=True)]
            judge._fitted = lambda groups: (packed, 0, 0)
            torch.cuda.reset_peak_memory_stats()
            judge.score(groups, backward=True)
        return device.allocator.most_allocated


# One of each; all twelve hold, in minutes.
@pytest.mark.parametrize(
    ("role", "mode", "budget"),
    [
        ("student", "off", 4096),
        ("discriminator", "selective", 512),
        pytest.param("student", "full", 512, marks=pytest.mark.slow),
        pytest.param("discriminator", "off", 512, marks=pytest.mark.slow),
    ],
)
def test_peaks_are_those_of_the_plan(tmp_path, role, mode, budget) -> None:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZE)).save_pretrained(tmp_path)
    kind = LlamaForCausalLM if role == "student" else LlamaForSequenceClassification
    found = peak(kind(LlamaConfig(**SIZE, num_labels=1)), role, mode, budget, some_groups(4))
    d = read_dimensions(str(tmp_path))
    case = preset_case("qwen2.5-3b", "h100-80gb-x1", "--algorithm.kl_coef", "0")
    work = Workload(
        prompts=4, samples=SAMPLES, prompt=PROMPT, response=RESPONSE, teacher=RESPONSE, limit=RESPONSE,
        longest_prompt=PROMPT, steps={"gad": 1}, eval_rows=0,
    )  # fmt: skip
    case = replace(case, student=d, discriminator=d, work=work)
    planned = state_memory(case, Choice(mode, budget, 0.0), role)
    expected = planned.total - planned.working["process"]
    assert abs(found / expected - 1) < 0.1
