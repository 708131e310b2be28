"""Adapters on a shared base against plain models of W + s B A under the literal schedule: every gradient, any cut."""

from __future__ import annotations

import pytest
import torch

from gadcore.kernels.quantised_linear import layers_of_bits, plain_weight
from gadcore.models import backbone
from gadcore.models.activations import set_mode
from gadcore.models.adapter import base_parameters
from tests.exactness.test_grouped import literal
from tests.support.adapters import by_chain_rule, merged, on_base, tiny_base
from tests.support.builders import assert_same_gradients, exact_norms, gradients, groups
from tests.support.naive import bt_loss, grpo_loss, score, token_logprobs
from tests.support.quantised import int8_values, nf4_values
from tests.support.tiny import tiny_model

FP64 = dict(rtol=1e-10, atol=1e-12)
KINDS = ["llama", "qwen2", "qwen3", "gemma3"]


def plainly(model):
    """A plain model of the same weights, that attends as transformers does and keeps everything."""
    plain = merged(model)
    set_mode(plain, "off", 0)
    return literal(plain)


def check(kind: str, mode: str, budget: int, kept: str = "none", targets: str | None = None) -> None:
    batch = groups(3, 4, seed=2, ragged=True)
    base = tiny_base(kind, kept=kept)
    student, discriminator = on_base(base, mode=mode, micro_batch_tokens=budget, targets=targets)
    assert backbone.is_pruned(student.model) and backbone.is_pruned(discriminator.model)
    student.freeze_reference()
    # The reference is the student as it was: from here on another one.
    with torch.no_grad():
        for p in student.optimizer.parameters:
            p.add_(0.02)
    policy, reference, scorer = map(plainly, (student.model, student.reference, discriminator.model))
    # Everything is computed before anything is compared: no role leaves something behind for another.
    scores = discriminator.score(batch, backward=True)
    stats = student.grpo_backward(batch, scores.rewards)

    loss = bt_loss(scorer, [(g.prompt.token_ids, g.teacher.token_ids, [s.token_ids for s in g.samples]) for g in batch])
    loss.backward()
    assert scores.loss == pytest.approx(loss.item(), rel=1e-10)
    with torch.no_grad():
        wanted = [[score(scorer, g.prompt.token_ids, s.token_ids).item() for s in g.samples] for g in batch]
    for rewards, expected in zip(scores.rewards, wanted, strict=True):
        assert rewards == pytest.approx(expected, rel=1e-10, abs=1e-12)
    assert_same_gradients(gradients(discriminator.model), by_chain_rule(discriminator.model, scorer), **FP64)

    def logps(model):
        return [[token_logprobs(model, g.prompt.token_ids, s.token_ids, 0.8) for s in g.samples] for g in batch]

    with torch.no_grad():
        refs = logps(reference)
    weights = [torch.tensor(r, dtype=torch.float64) for r in scores.rewards]
    loss = grpo_loss(
        [(p, None, r, w) for p, r, w in zip(logps(policy), refs, weights, strict=True)], clip=0.2, beta=0.05
    )
    loss.backward()
    assert stats.loss == pytest.approx(loss.item(), rel=1e-10, abs=1e-12)
    assert_same_gradients(gradients(student.model), by_chain_rule(student.model, policy), **FP64)

    for model in (student.model, discriminator.model, student.reference):
        frozen = base_parameters(model)
        assert frozen and all(p.grad is None and not p.requires_grad for p in frozen.values())


# Every family and every mode once; the others by hand.
FIRST = [("llama", "off"), ("qwen2", "selective"), ("qwen3", "full"), ("gemma3", "full")]
REST = [(kind, mode) for kind in KINDS for mode in ("off", "selective", "full") if (kind, mode) not in FIRST]


@pytest.mark.parametrize(("kind", "mode"), [*FIRST, *(pytest.param(*c, marks=pytest.mark.by_hand) for c in REST)])
def test_gradients_are_those_of_one_matrix(kind, mode) -> None:
    check(kind, mode, 10**6)


@pytest.mark.parametrize(
    ("mode", "budget"),
    [("full", 70), *(pytest.param(m, b, marks=pytest.mark.by_hand) for m, b in (("off", 1), ("full", 1), ("off", 70)))],
)
def test_any_cut_and_a_group_that_had_to_be_split(mode, budget) -> None:
    check("qwen2", mode, budget)


def written_out(kind: str, kept: str) -> dict[str, torch.Tensor]:
    """The weights of the decoder layers' matrices as few bits have them, by their definition."""
    literal_values = {"int8": int8_values, "nf4": nf4_values}[kept]
    layers = [(n, m) for n, m in exact_norms(tiny_model(kind).double()).model.layers.named_modules()]
    return {
        f"model.layers.{name}": torch.tensor(literal_values(module.weight.tolist()), dtype=torch.float64)
        for name, module in layers
        if isinstance(module, torch.nn.Linear)
    }


@pytest.mark.parametrize(
    ("kind", "mode", "budget", "kept", "targets"),
    [
        ("llama", "off", 10**6, "nf4", None),
        ("qwen2", "selective", 70, "nf4", None),
        # Layers without an adapter are kept in few bits as well.
        ("llama", "full", 10**6, "int8", "q_proj,v_proj"),
        ("gemma3", "off", 10**6, "nf4", "o_proj,up_proj"),
        *(
            pytest.param(kind, mode, 10**6, kept, None, marks=pytest.mark.by_hand)
            for kind in KINDS
            for mode in ("off", "selective", "full")
            for kept in ("int8", "nf4")
        ),
    ],
)
def test_gradients_through_a_base_in_few_bits(kind, mode, budget, kept, targets) -> None:
    """Loss and gradients of A, B and head are those of plain matrices of what the bits say."""
    check(kind, mode, budget, kept, targets)


@pytest.mark.parametrize("kept", ["int8", "nf4"])
def test_a_base_in_few_bits_computes_with_what_the_definition_says(kept) -> None:
    student, _ = on_base(tiny_base("llama", kept=kept), values=False)
    expected = written_out("llama", kept)
    layers = layers_of_bits(student.model)
    assert layers.keys() == expected.keys()
    for name, layer in layers.items():
        # A scale that lies between two of its values may be rounded to either.
        assert (plain_weight(layer) - expected[name]).norm() <= 1e-4 * expected[name].norm(), name
        assert not torch.equal(expected[name], tiny_model("llama").get_submodule(name).weight.double())


def test_cross_entropy(tmp_path) -> None:
    batch = groups(3, 2)
    student, _ = on_base(tiny_base("gemma3"))
    policy = plainly(student.model)
    stats = student.seqkd_backward(batch)
    count = sum(len(g.teacher.token_ids) for g in batch)
    loss = -sum(token_logprobs(policy, g.prompt.token_ids, g.teacher.token_ids, 1.0).sum() for g in batch) / count
    loss.backward()
    assert stats.ce == pytest.approx(loss.item(), rel=1e-10)
    assert_same_gradients(gradients(student.model), by_chain_rule(student.model, policy), **FP64)
