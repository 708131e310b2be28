"""The packed engine against the literal schedule, in every model family: rewards, losses, every gradient, any cut."""

from __future__ import annotations

import copy
import random

import pytest
import torch

from gadcore.data.groups import Group, micro_batches
from gadcore.models import backbone
from gadcore.models.checks import check_packing
from gadcore.models.shallow import probe_batch
from tests.support.builders import TEMPLATE, assert_same_gradients, discriminator, gradients, groups, student
from tests.support.naive import bt_loss, grpo_loss, score, token_logprobs
from tests.support.tiny import FAMILIES, tiny_model

FP64 = dict(rtol=1e-10, atol=1e-12)


def literal(model):
    """The same weights with transformers' own attention (its "eager" one rounds to fp32 inside)."""
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("sdpa")
    for layer in plain.base_model.layers:
        layer._forward_pre_hooks.clear()
        layer._forward_pre_hooks_with_kwargs.clear()
    return plain


def perturbed(model):
    other = copy.deepcopy(model).requires_grad_(False)
    generator = torch.Generator().manual_seed(9)
    for p in other.parameters():
        p.add_(0.05 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype))
    return other


def one_group(samples: int) -> list[Group]:
    (group,) = groups(1, samples, seed=3)
    return [group]


def check_student(batch: list[Group], budget: int, **family) -> None:
    ours = student(micro_batch_tokens=budget, **family)
    theirs = literal(ours.model)
    ours.reference = perturbed(ours.model)
    reference = literal(ours.reference)
    assert backbone.is_pruned(ours.model) and backbone.is_pruned(ours.reference)
    rewards = [[0.3 * i**2 - 0.1 * g for i in range(len(group.samples))] for g, group in enumerate(batch)]

    stats = ours.grpo_backward(batch, rewards)

    def logps(model):
        return [[token_logprobs(model, g.prompt.token_ids, s.token_ids, 0.8) for s in g.samples] for g in batch]

    with torch.no_grad():
        refs = logps(reference)
    weights = [torch.tensor(r, dtype=torch.float64) for r in rewards]
    loss = grpo_loss(
        [(p, None, r, w) for p, r, w in zip(logps(theirs), refs, weights, strict=True)], clip=0.2, beta=0.05
    )
    loss.backward()
    assert stats.loss == pytest.approx(loss.item(), rel=1e-10, abs=1e-12)
    assert_same_gradients(gradients(ours.model), gradients(theirs), **FP64)


def check_discriminator(directory, batch: list[Group], budget: int, **family) -> None:
    ours = discriminator(directory, micro_batch_tokens=budget, **family)
    assert backbone.is_pruned(ours.model)
    theirs = literal(ours.model)
    with torch.no_grad():
        wanted = [[score(theirs, g.prompt.token_ids, s.token_ids).item() for s in g.samples] for g in batch]

    scores = ours.score(batch, backward=True)

    loss = bt_loss(theirs, [(g.prompt.token_ids, g.teacher.token_ids, [s.token_ids for s in g.samples]) for g in batch])
    loss.backward()
    for rewards, expected in zip(scores.rewards, wanted, strict=True):
        assert rewards == pytest.approx(expected, rel=1e-10, abs=1e-12)
    assert scores.loss == pytest.approx(loss.item(), rel=1e-10)
    assert_same_gradients(gradients(ours.model), gradients(theirs), **FP64)


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_equals_the_literal_schedule(tmp_path, kind, kv_heads) -> None:
    batch = groups(3, 3, ragged=True)
    check_student(batch, 10**6, kind=kind, kv_heads=kv_heads, tied=kv_heads == 1)
    check_discriminator(tmp_path, batch, 10**6, kind=kind, kv_heads=kv_heads)


@pytest.mark.parametrize("budget", [1, 70, 120])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_any_cut_and_a_group_that_had_to_be_split(tmp_path, kind, budget) -> None:
    batch = groups(3, 5, seed=2, ragged=True)
    check_student(batch, budget, kind=kind)
    check_discriminator(tmp_path, batch, budget, kind=kind)


@pytest.mark.parametrize("samples", [1, 8, 16])
def test_groups_of_any_size(tmp_path, samples) -> None:
    batch = one_group(samples)
    check_discriminator(tmp_path, batch, 10**6)
    if samples > 1:
        check_student(batch, 10**6)


def test_cut_groups_are_cut() -> None:
    """The cuts above do what their names say."""
    ours = student()
    tokens = [discriminator_tokens(group) for group in groups(3, 5, seed=2, ragged=True)]
    for budget in (1, 70):
        cuts = micro_batches(tokens, budget, ours.cost, teacher=True)
        assert any(0 in part.responses and len(part.responses) < len(tokens[part.group].responses) for [part] in cuts)
    assert len(micro_batches(tokens, 120, ours.cost, teacher=True)) > 1


def discriminator_tokens(group: Group):
    from gadcore.data.groups import GroupTokens

    texts = (group.teacher, *group.samples)
    return GroupTokens(group.prompt.token_ids, tuple(TEMPLATE.response_ids(r.text, finished=r.finished) for r in texts))


def test_the_135m_shape_in_fp32() -> None:
    """Two layers of SmolLM2-135M's width: loss and gradients to 1e-5 of their size, against fp64 rows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from gadcore.config.settings import AlgorithmSettings, StudentSettings
    from gadcore.models.student import Student

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    rng = random.Random(0)
    (group,) = groups(1, 8)
    samples = []
    for sample in group.samples:
        ids = tuple(rng.randrange(49152) for _ in range(rng.randint(5, 30)))
        samples.append(type(sample)("", ids, True, tuple(-1.0 for _ in ids)))
    group.samples = samples
    rewards = [rng.random() for _ in samples]
    ours = Student(model, StudentSettings(), AlgorithmSettings(kl_coef=0.0), temperature=0.8, micro_batch_tokens=10**6)
    theirs = literal(model).double()
    stats = ours.grpo_backward([group], [rewards])
    logps = [token_logprobs(theirs, group.prompt.token_ids, s.token_ids, 0.8) for s in samples]
    loss = grpo_loss([(logps, None, None, torch.tensor(rewards, dtype=torch.float64))], clip=0.2, beta=0.0)
    loss.backward()
    assert stats.loss == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
    for (name, p), q in zip(model.named_parameters(), theirs.parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= 1e-5 * q.grad.norm(), name


# What does not fit


def test_capped_attention_is_refused_by_name() -> None:
    model = tiny_model("gemma3")
    model.config.attn_logit_softcapping = 50.0
    backbone.use_packed_attention(model)
    with pytest.raises(Exception, match="attn_logit_softcapping"):
        check_packing(model, "here")


def test_attention_that_looks_ahead_is_refused() -> None:
    model = tiny_model()
    backbone.use_packed_attention(model)
    check_packing(model, "here")
    # Something that no layout describes: the first token of the row is added to all.
    model.base_model.layers[0].self_attn.register_forward_hook(lambda m, a, out: (out[0] + out[0][:, :1], out[1]))
    with pytest.raises(Exception, match="here .llama. does not fit packed groups: its hidden states differ"):
        check_packing(model, "here")


def test_a_last_layer_of_another_build_is_computed_whole() -> None:
    model = tiny_model()
    backbone.use_packed_attention(model)
    model.base_model.layers[-1].mlp.register_forward_hook(lambda m, a, out: out + out.mean(1, keepdim=True))
    assert not backbone.prune_last_layer(model) and not backbone.is_pruned(model)
    batch = probe_batch(model)
    whole = backbone.hidden_states(model, batch)
    assert torch.equal(backbone.last_hidden_states(model, batch), whole[batch.last_index])
    assert torch.equal(backbone.predicting_states(model, batch), whole[batch.predicting[batch.predicted_by]])


@pytest.mark.parametrize("read", [backbone.last_hidden_states, backbone.predicting_states])
def test_a_pruned_last_layer_computes_a_few_tokens_alone(read) -> None:
    model = tiny_model()
    backbone.use_packed_attention(model)
    assert backbone.prune_last_layer(model) and backbone.prune_last_layer(model)
    batch, seen = probe_batch(model), []
    model.base_model.layers[-1].mlp.register_forward_hook(lambda m, a, out: seen.append(out.shape[1]))
    read(model, batch)
    index = batch.last_index if read is backbone.last_hidden_states else batch.predicting[batch.predicted_by]
    assert seen == [len(index.unique())] and seen[0] < batch.layout.tokens
