"""D against the literal specification: score, BT loss, gradients, cuts, EOS parity."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from gadcore.config.settings import DiscriminatorSettings
from gadcore.data.groups import Group, Response
from gadcore.data.template import ChatTemplate
from gadcore.errors import UserError
from gadcore.kernels.layout import GroupLayout
from gadcore.models.bt_loss import softened_bt_loss
from gadcore.models.discriminator import Discriminator
from gadcore.models.loading import load_discriminator, save_model
from gadcore.models.spec import same_tokenizer
from tests.support.builders import TEMPLATE, assert_same_gradients, discriminator, gradients, groups, response
from tests.support.naive import bt_loss, score
from tests.support.tiny import save_tiny, tiny_tokenizer

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

    scores = once.score(batch, backward=True)
    loss = bt_loss(pairs.model, as_tuples(batch))
    loss.backward()

    assert scores.loss == pytest.approx(loss.item(), rel=1e-9 if dtype == torch.float64 else 1e-5)
    assert_same_gradients(gradients(once.model), gradients(pairs.model), **TOLERANCE[dtype])


def test_rewards_are_the_scores_under_the_weights_before_the_update(tmp_path) -> None:
    batch, d = groups(3, 3), discriminator(tmp_path)
    with torch.no_grad():
        expected = [[score(d.model, g.prompt.token_ids, s.token_ids).item() for s in g.samples] for g in batch]
        teacher = [score(d.model, g.prompt.token_ids, g.teacher.token_ids).item() for g in batch]
    scores = d.score(batch, backward=True)
    for rewards, wanted in zip(scores.rewards, expected, strict=True):
        assert rewards == pytest.approx(wanted, rel=1e-9)
    assert scores.teacher_scores == pytest.approx(teacher, rel=1e-9)
    d.step()
    assert d.score(batch, backward=False).rewards[0] != pytest.approx(expected[0], rel=1e-9)


def test_micro_batch_cuts_change_nothing(tmp_path) -> None:
    batch = groups(5, 3, ragged=True)
    results = []
    for budget in (1, 150, 10**6):
        d = discriminator(tmp_path, micro_batch_tokens=budget)
        results.append((d.score(batch, backward=True), gradients(d.model)))
    (whole, expected) = results[-1]
    for scores, grads in results[:-1]:
        assert scores.loss == pytest.approx(whole.loss, rel=1e-12)
        assert scores.accuracy == pytest.approx(whole.accuracy)
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
        scores = d.score(batch, backward=False)
        for teacher, rewards in zip(scores.teacher_scores, scores.rewards, strict=True):
            assert rewards[position] == teacher
            assert all(r != teacher for i, r in enumerate(rewards) if i != position)


def test_end_marker_is_seen(tmp_path) -> None:
    (group,) = groups(1, 2)
    group.samples = [response("Paris.", finished=True), response("Paris.", finished=False)]
    finished, cut = discriminator(tmp_path).score([group], backward=False).rewards[0]
    assert finished != cut


def test_scores_are_fp32_out_of_a_bf16_backbone(tmp_path) -> None:
    """At |D| of 8 and more the steps of bf16 would quantise the advantages of a group."""
    batch, d = groups(4, 4), discriminator(tmp_path, torch.bfloat16)
    with torch.no_grad():
        d.model.score.weight.mul_(20)
    rewards = [r for group in d.score(batch, backward=False).rewards for r in group]
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
    scores = d.score(batch, backward=False)
    save_model(d.model, tokenizer, tmp_path / "exported")

    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "exported")
    width = 120
    for group, rewards in zip(batch, scores.rewards, strict=True):
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
    assert d.score(batch, backward=True).rewards == d.score(batch, backward=True).rewards


# Remedies


@pytest.mark.parametrize(("smoothing", "cap"), [(0.2, None), (0.0, 0.1), (0.1, 0.3), (0.45, 1e-3)])
@pytest.mark.parametrize("budget", [1, 10**6])
def test_softened_loss_equals_the_literal_formula(tmp_path, smoothing, cap, budget) -> None:
    batch = groups(3, 3, ragged=True)
    ours, theirs = discriminator(tmp_path, micro_batch_tokens=budget), discriminator(tmp_path)
    ours.settings = DiscriminatorSettings(label_smoothing=smoothing, margin_cap=cap)

    scores = ours.score(batch, backward=True)

    losses, margins = [], []
    for prompt, teacher, samples in as_tuples(batch):
        for sample in samples:
            margin = score(theirs.model, prompt, teacher) - score(theirs.model, prompt, sample)
            margins.append(margin.item())
            if cap is not None and margin.item() > cap:
                margin = margin.detach() * 0 + cap
            right, wrong = torch.sigmoid(margin), torch.sigmoid(-margin)
            losses.append(-(1 - smoothing) * torch.log(right) - smoothing * torch.log(wrong))
    loss = torch.stack(losses).mean()
    loss.backward()
    if cap is not None:
        assert any(m > cap for m in margins) and any(m < cap for m in margins)
    assert scores.loss == pytest.approx(loss.item(), rel=1e-9)
    assert scores.margin == pytest.approx(sum(margins) / len(margins))
    assert_same_gradients(gradients(ours.model), gradients(theirs.model), **TOLERANCE[torch.float64])


def test_without_remedies_the_loss_is_the_ops_own(tmp_path) -> None:
    batch, d = groups(3, 3), discriminator(tmp_path)
    plain = d.score(batch, backward=True)
    layout = GroupLayout.of([3, 3, 3], teacher=True)
    scores = [s for t, rewards in zip(plain.teacher_scores, plain.rewards, strict=True) for s in (t, *rewards)]
    softened = softened_bt_loss(torch.tensor(scores, dtype=torch.float64), layout, 0.0, None) / 9
    assert softened.item() == pytest.approx(plain.loss, rel=1e-12)


# D with a vocabulary of its own

LLAMA3 = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '<|sep|>' + m['content'] + '<|stop|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|sep|>' }}{% endif %}"
)


def other_template() -> ChatTemplate:
    """Other merges, other special tokens at other places, another end marker."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|pad|>", "<|start|>", "<|sep|>", "<|stop|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["It is zero, and so on, zero and it is so."], trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|stop|>", pad_token="<|pad|>", chat_template=LLAMA3
    )
    return ChatTemplate(wrapped)


def other_discriminator(tmp_path) -> Discriminator:
    d = discriminator(tmp_path, kind="qwen2")
    d.template, d.same_vocabulary = other_template(), False
    return d


def test_another_vocabulary_is_reached_through_text_alone(tmp_path) -> None:
    """Against the literal loss on the ids of D's own template; the student's ids are replaced by nonsense."""
    batch, once, pairs = groups(3, 3, ragged=True), other_discriminator(tmp_path), other_discriminator(tmp_path)
    template, literal = once.template, []
    for group in batch:
        prompt = template.prompt_ids(group.prompt.messages)
        sides = [
            template._encode(r.text) + ((template.tokenizer.eos_token_id,) if r.finished else ())
            for r in (group.teacher, *group.samples)
        ]
        literal.append((prompt, sides[0], sides[1:]))
        group.prompt = replace(group.prompt, token_ids=(1,) * 7)
        group.teacher = replace(group.teacher, token_ids=(2,) * 3)
        group.samples = [replace(s, token_ids=(3,) * 5) for s in group.samples]
    assert template.end_id != TEMPLATE.end_id

    scores = once.score(batch, backward=True)
    loss = bt_loss(pairs.model, literal)
    loss.backward()
    assert scores.loss == pytest.approx(loss.item(), rel=1e-9)
    # The rotary embedding is fp32 in every model, and its cosines differ by an ulp with where they stand in a tensor.
    assert_same_gradients(gradients(once.model), gradients(pairs.model), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("finished", [True, False])
def test_identical_text_scores_identically_in_another_vocabulary(tmp_path, finished) -> None:
    """The sample comes as ids of the student's, drawn letter by letter, the teacher's text as text."""
    text, d = "It is zero, and so on.", other_discriminator(tmp_path)
    letters = tuple(i for letter in text for i in TEMPLATE.response_ids(letter, finished=False))
    back, _ = TEMPLATE.text_of(letters)
    assert back == text and letters != TEMPLATE.response_ids(text, finished=False)
    batch = groups(2, 3)
    for group in batch:
        group.teacher = response(text, finished=finished)
        group.samples[1] = Response(back, letters, finished)
    scores = d.score(batch, backward=False)
    for teacher, rewards in zip(scores.teacher_scores, scores.rewards, strict=True):
        assert rewards[1] == teacher and rewards[0] != teacher and rewards[2] != teacher
    batch[0].samples = [response(text, finished=True), response(text, finished=False)]
    first, second = d.score(batch[:1], backward=False).rewards[0]
    assert first != second, "the end marker of D's own vocabulary is seen"


def test_a_context_that_is_too_short_is_told_with_the_row(tmp_path) -> None:
    batch, d = groups(2, 2), other_discriminator(tmp_path)
    needed = max(len(tokens.prompt) + len(tokens.responses[0]) for tokens in d.tokens(batch))
    d.context_tokens = needed
    d.score(batch, backward=False)
    d.context_tokens = needed - 1
    with pytest.raises(UserError, match=rf"row \d .* needs {needed} of the discriminator's tokens.*{needed - 1}"):
        d.score(batch, backward=False)


def test_tokenizers_are_compared_by_what_they_do(tmp_path) -> None:
    assert same_tokenizer(TEMPLATE, ChatTemplate(tiny_tokenizer()))
    assert not same_tokenizer(TEMPLATE, other_template())
    changed = tiny_tokenizer()
    changed.chat_template = changed.chat_template.replace("\n", "\n\n")
    assert not same_tokenizer(TEMPLATE, ChatTemplate(changed))
