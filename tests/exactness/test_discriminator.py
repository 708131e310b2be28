"""D against the literal specification: score, BT loss, gradients, cuts, EOS parity."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from builders import TEMPLATE, assert_same_gradients, discriminator, gradients, groups, response
from gadcore.groups import Group
from gadcore.models import load_discriminator, save_model
from naive import bt_loss, score
from tiny import save_tiny, tiny_tokenizer

TOLERANCE = {torch.float64: dict(rtol=1e-9, atol=1e-11), torch.float32: dict(rtol=2e-3, atol=2e-5)}


def fresh(path, seed, tokenizer=None):
    tokenizer = tokenizer or tiny_tokenizer()
    cpu = torch.device("cpu")
    return load_discriminator(str(path), "float32", device=cpu, seed=seed, end_id=TEMPLATE.end_id, tokenizer=tokenizer)


def as_tuples(batch: list[Group]) -> list[tuple]:
    return [(g.prompt.token_ids, g.teacher.token_ids, [s.token_ids for s in g.samples]) for g in batch]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("count", "samples", "ragged"), [(1, 2, False), (3, 4, False), (4, 3, True)])
def test_teacher_once_equals_n_pairs(tmp_path, dtype, count, samples, ragged) -> None:
    batch = groups(count, samples, ragged=ragged)
    once, pairs = discriminator(tmp_path, dtype), discriminator(tmp_path, dtype)

    judgement = once.judge(batch, backward=True)
    loss = bt_loss(pairs.model, as_tuples(batch))
    loss.backward()

    assert judgement.loss == pytest.approx(loss.item(), rel=1e-9 if dtype == torch.float64 else 1e-5)
    assert_same_gradients(gradients(once.model), gradients(pairs.model), **TOLERANCE[dtype])


def test_rewards_are_the_scores_under_the_weights_before_the_update(tmp_path) -> None:
    batch, d = groups(3, 3), discriminator(tmp_path)
    with torch.no_grad():
        expected = [[score(d.model, g.prompt.token_ids, s.token_ids).item() for s in g.samples] for g in batch]
        teacher = [score(d.model, g.prompt.token_ids, g.teacher.token_ids).item() for g in batch]
    judgement = d.judge(batch, backward=True)
    for rewards, wanted in zip(judgement.rewards, expected, strict=True):
        assert rewards == pytest.approx(wanted, rel=1e-9)
    assert judgement.teacher_scores == pytest.approx(teacher, rel=1e-9)
    d.step()
    assert d.judge(batch, backward=False).rewards[0] != pytest.approx(expected[0], rel=1e-9)


def test_micro_batch_cuts_change_nothing(tmp_path) -> None:
    batch = groups(5, 3, ragged=True)
    results = []
    for budget in (1, 150, 10**6):
        d = discriminator(tmp_path, micro_batch_tokens=budget)
        results.append((d.judge(batch, backward=True), gradients(d.model)))
    (whole, expected) = results[-1]
    for judgement, grads in results[:-1]:
        assert judgement.loss == pytest.approx(whole.loss, rel=1e-12)
        assert judgement.accuracy == pytest.approx(whole.accuracy)
        assert_same_gradients(grads, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("finished", [True, False])
def test_identical_text_scores_identically_to_the_bit(tmp_path, finished) -> None:
    """EOS parity: the teacher's text and a sample with the same text are the same sequence for D."""
    text = "It is a city on the Seine."
    sampled = TEMPLATE.response_ids(text, finished=finished)
    back, ended = TEMPLATE.text_of(sampled)
    assert (back, ended) == (text, finished)
    for position in range(4):
        batch = groups(2, 4)
        for group in batch:
            group.teacher = response(text, finished=finished)
            group.samples = [response(f"Zero, {i}") for i in range(4)]
            group.samples[position] = response(back, finished=ended)
        d = discriminator(tmp_path, torch.float32)
        judgement = d.judge(batch, backward=False)
        for teacher, rewards in zip(judgement.teacher_scores, judgement.rewards, strict=True):
            assert rewards[position] == teacher
            assert all(r != teacher for i, r in enumerate(rewards) if i != position)


def test_end_marker_is_seen(tmp_path) -> None:
    (group,) = groups(1, 2)
    group.samples = [response("Paris.", finished=True), response("Paris.", finished=False)]
    finished, cut = discriminator(tmp_path).judge([group], backward=False).rewards[0]
    assert finished != cut


def test_scores_are_fp32_out_of_a_bf16_backbone(tmp_path) -> None:
    """At |D| of 8 and more the steps of bf16 would quantise the advantages of a group."""
    batch, d = groups(4, 4), discriminator(tmp_path, torch.bfloat16)
    with torch.no_grad():
        d.model.score.weight.mul_(20)
    rewards = [r for group in d.judge(batch, backward=False).rewards for r in group]
    assert max(abs(r) for r in rewards) > 8
    assert any(torch.tensor(r).bfloat16().item() != r for r in rewards)


def test_exported_discriminator_scores_the_same_through_transformers(tmp_path) -> None:
    """Hugging Face reads the score at the last token that is not padding: it must be the end marker."""
    path = save_tiny(tmp_path / "base")
    tokenizer = tiny_tokenizer()
    assert tokenizer.pad_token_id == TEMPLATE.end_id
    d = discriminator(tmp_path)
    d.model = fresh(path, 3, tokenizer)
    batch = groups(2, 2)
    judgement = d.judge(batch, backward=False)
    save_model(d.model, tokenizer, tmp_path / "exported")

    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "exported")
    width = 120
    for group, rewards in zip(batch, judgement.rewards, strict=True):
        for sample, reward in zip(group.samples, rewards, strict=True):
            ids = [*group.prompt.token_ids, *sample.token_ids]
            padded = torch.tensor([ids + [loaded.config.pad_token_id] * (width - len(ids))] * 2)
            mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids))] * 2)
            logits = loaded(input_ids=padded, attention_mask=mask).logits
            assert logits[0, 0].item() == pytest.approx(reward, rel=1e-4, abs=1e-5)


def test_fresh_head_depends_on_the_seed_alone(tmp_path) -> None:
    path = save_tiny(tmp_path / "base")
    heads = [fresh(path, seed).score.weight for seed in (1, 1, 2)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_dropout_is_off(tmp_path) -> None:
    """Some sequence-classification configs bring dropout along."""
    path = save_tiny(tmp_path / "base")
    config = (path / "config.json").read_text().replace('"attention_dropout": 0.0', '"attention_dropout": 0.5')
    assert "0.5" in config
    (path / "config.json").write_text(config)
    d = discriminator(tmp_path)
    d.model = fresh(path, 3)
    batch = groups(2, 2)
    d.model.train()
    assert d.judge(batch, backward=True).rewards == d.judge(batch, backward=True).rewards
