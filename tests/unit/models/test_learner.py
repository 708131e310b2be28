"""What both models share: one read of the device a step, rows encoded once, one line to load, probes on few layers."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from gadcore.config.settings import AlgorithmSettings, DiscriminatorSettings, StudentSettings
from gadcore.models.backbone import is_pruned
from gadcore.models.discriminator import Discriminator, Scores
from gadcore.models.shallow import decoder_layers, shallow
from gadcore.models.spec import ModelSpec
from gadcore.models.student import Student
from tests.support.builders import TEMPLATE, discriminator, groups, student
from tests.support.reads import CountingTokenizer, device_reads
from tests.support.tiny import FAMILIES, save_tiny, tiny_model

# Small enough that the batch of these tests is cut into many micro-batches.
BUDGET = 60


def test_the_student_is_read_once_a_step() -> None:
    ours, batch = student(torch.float32, micro_batch_tokens=BUDGET), groups(6, 4)
    ours.freeze_reference()
    rewards = torch.arange(24.0)
    with device_reads() as reads:
        stats = ours.grpo_backward(batch, rewards)
        norm = ours.step(1e-4)
        assert stats.loss == stats.loss and stats.kl > -1 and norm > 0
    assert reads.total() == 1, reads


def test_seqkd_is_read_once_a_step() -> None:
    ours = student(torch.float32, micro_batch_tokens=BUDGET)
    with device_reads() as reads:
        stats = ours.seqkd_backward(groups(6, 4))
        ours.step(1e-4)
        assert stats.ce > 0
    assert reads.total() == 1, reads


def test_the_discriminator_is_read_once_a_step_and_its_rewards_not_at_all(tmp_path) -> None:
    d, batch = discriminator(tmp_path, torch.float32, micro_batch_tokens=BUDGET), groups(6, 4)
    with device_reads() as reads:
        scores = d.score(batch, backward=True)
        assert scores.sample_scores.shape == (24,)
        assert not reads, reads
        d.step()
        assert scores.loss > 0 and len(scores.rewards) == len(scores.teacher_scores) == 6
    assert reads.total() == 1, reads
    flat = [r for group in scores.rewards for r in group]
    assert flat == scores.sample_scores.tolist()


def test_scores_without_an_update_wait_for_nobody(tmp_path) -> None:
    d = discriminator(tmp_path, torch.float32)
    for _ in range(3):
        d.score(groups(2, 2), backward=False)
    assert d._unread == [], "scores that nobody trains on are kept"


def test_a_row_is_encoded_once_and_the_samples_of_a_batch_by_one_call(tmp_path) -> None:
    d, batch, others = discriminator(tmp_path, torch.float32), groups(6, 4), groups(6, 4)
    try:
        d.template.tokenizer = counting = CountingTokenizer(TEMPLATE.tokenizer)
        first = d.tokens(batch)
        assert counting.calls == 2, "one call for all teachers, one for all samples"
        assert d.tokens(batch) == first and counting.calls == 3
        # The same texts in rows of their own are other rows.
        d.tokens(others)
        assert counting.calls == 5
    finally:
        d.template.tokenizer = TEMPLATE.tokenizer


def test_both_load_in_one_line(tmp_path) -> None:
    path = str(save_tiny(tmp_path))
    pupil, d, batch = Student.load(path, device="cpu"), Discriminator.load(path, device="cpu"), groups(2, 3)
    # D renders the prompts' messages itself: nobody said that their tokens are its own.
    assert not d.same_vocabulary and [t.prompt for t in d.tokens(batch)] == [g.prompt.token_ids for g in batch]
    scores = d.score(batch, backward=True)
    pupil.freeze_reference()
    stats = pupil.grpo_backward(batch, scores.sample_scores)
    assert pupil.step() > 0 and d.step() > 0 and stats.tokens > 0
    for learner in (pupil, d):
        learner.save(tmp_path / learner.owner)
    again = Discriminator.load(str(tmp_path / "discriminator"), DiscriminatorSettings(lr=1e-3), device="cpu")
    # Saved after the update, which moved them.
    assert again.score(batch, backward=False).rewards == d.score(batch, backward=False).rewards != scores.rewards


def test_one_spec_serves_both_roles(tmp_path) -> None:
    spec = ModelSpec.resolve(str(save_tiny(tmp_path)))
    assert spec.context_tokens == 256 and spec.same_tokens(spec)
    d = Discriminator.load(spec, student=spec, device="cpu")
    assert d.same_vocabulary and d.template is spec.template
    # D is saved with a padding token of its own, which the student's tokenizer does not get.
    d.save(tmp_path / "d")
    pads = [
        json.loads((path / "tokenizer_config.json").read_text())["pad_token"] for path in (tmp_path, tmp_path / "d")
    ]
    assert pads[1] != pads[0] == spec.tokenizer.pad_token


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", list(FAMILIES))
def test_a_reference_in_autocasts_dtype_gives_the_same_bits(kind, tied) -> None:
    model = tiny_model(kind, tied=tied)
    settings = StudentSettings(autocast="bfloat16")
    pupil = Student(model, settings, AlgorithmSettings(), temperature=0.8, micro_batch_tokens=100)
    pupil.freeze_reference()
    short = pupil.reference
    assert short is not None and not any(p.requires_grad for p in short.parameters())
    kept = {name: p.dtype for name, p in short.named_parameters()}
    layers = [dtype for name, dtype in kept.items() if "_proj." in name]
    assert set(layers) == {torch.bfloat16} and len(layers) >= 2 * 7
    assert all(dtype == torch.float32 for name, dtype in kept.items() if "norm" in name or "embed" in name)
    assert kept.get("lm_head.weight", torch.bfloat16) == torch.bfloat16 and ("lm_head.weight" in kept) == (not tied)
    batch = groups(3, 3, ragged=True)
    found = pupil.reference_logprobs(batch)
    # As it was: a copy in fp32, which autocast rounds in every pass.
    pupil.reference = copy.deepcopy(model).requires_grad_(False)
    assert {p.dtype for p in pupil.reference.parameters()} == {torch.float32}
    expected = pupil.reference_logprobs(batch)
    assert found is not None and expected is not None and found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_a_student_without_a_tokenizer_cannot_be_saved(tmp_path) -> None:
    with pytest.raises(ValueError, match="the student was made without a tokenizer"):
        student().save(tmp_path)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "smollm3"])
def test_loading_runs_a_layer_of_each_kind_and_no_other(tmp_path, kind) -> None:
    """Of 12 layers, in which two kinds alternate where the family has two."""
    config = tiny_model(kind).config
    config.num_hidden_layers = 12
    for name in ("layer_types", "no_rope_layers"):
        if getattr(config, name, None):
            setattr(config, name, list(getattr(config, name)) * 6)
    deep = type(tiny_model(kind))(config)
    deep.save_pretrained(tmp_path)
    TEMPLATE.tokenizer.save_pretrained(tmp_path)
    ran = set()
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: ran.add(module.self_attn.layer_idx) if hasattr(module, "self_attn") else None
    )
    try:
        made = Student.load(str(tmp_path), device="cpu")
    finally:
        hook.remove()
    assert ran == {0, 1, 11} and is_pruned(made.model) and len(decoder_layers(made.model)) == 12
    assert made.model.config.num_hidden_layers == 12


def test_shallow_puts_the_model_back_after_an_error() -> None:
    model = tiny_model()
    layers = decoder_layers(model)
    with pytest.raises(ZeroDivisionError), shallow(model, 1):
        assert len(decoder_layers(model)) == model.config.num_hidden_layers == 1
        raise ZeroDivisionError
    assert decoder_layers(model) is layers and model.config.num_hidden_layers == 2


def test_scores_made_elsewhere_have_the_losses_that_follow() -> None:
    scores = Scores.of([[1.0, 3.0], [0.0]], [2.0, 0.0], tokens=7)
    assert scores.rewards == [[1.0, 3.0], [0.0]] and scores.teacher_scores == [2.0, 0.0] and scores.tokens == 7
    # Margins 1, -1 and 0: a tie is half a correct pair.
    assert scores.accuracy == 0.5 and scores.margin == 0
    assert scores.loss == pytest.approx((0.31326168751822286 + 1.3132616875182228 + 0.6931471805599453) / 3)
