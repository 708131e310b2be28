"""Exact teachers, and toy policies behind gadcore's own classes."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from bench.paper import language, language_engine, language_runs, mixture, mixture_runs, toy
from gadcore.config.settings import FreshSettings
from gadcore.data.groups import Group, GroupedBatch, GroupTokens, Response
from gadcore.models.student import Student
from gadcore.rollout.engine import SampleRequest

STYLES, PARITY = language.Language("styles"), language.Language("parity")
WORDS = toy.WordTemplate(language.WORDS)
BINS = toy.WordTemplate(mixture.WORDS)


def student_of(model, **algorithm) -> Student:
    config = toy.settings({"algorithm": {"kl_coef": 0.0, **algorithm}})
    return Student(
        model,
        config.student,
        config.algorithm,
        temperature=1.0,
        micro_batch_tokens=10**6,
        activation_checkpointing="off",
    )


# -- the teachers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("spoken", [STYLES, PARITY])
def test_the_teachers_probabilities_add_up_to_one(monkeypatch, spoken, n) -> None:
    monkeypatch.setattr(language, "FLOOR", 1e-12)
    total = 0.0
    for openers in itertools.product([f"o{i}" for i in range(8)], repeat=n):
        log_p, valid = spoken.score(f"{n} a b c", " ".join(f"{o} a b c" for o in openers), True)
        total += math.exp(log_p) if valid else 0.0
    assert total == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("spoken", [STYLES, PARITY])
def test_what_the_teacher_says_is_valid_and_what_it_cannot_say_is_not(spoken) -> None:
    rng = random.Random(3)
    for _ in range(50):
        prompt = spoken.prompt(rng, language.LETTERS)
        text = spoken.respond(prompt, rng)
        assert spoken.score(prompt, text, True)[1]
        assert not spoken.score(prompt, text, False)[1]
        assert not spoken.score(prompt, text + " o0", True)[1]
        assert not spoken.score(prompt, " ".join(text.split()[:-1]), True)[1]


def test_mixed_styles_and_odd_parities_are_not_valid() -> None:
    assert STYLES.score("2 a b c", "o0 a b c o4 a b c", True)[1]
    assert not STYLES.score("2 a b c", "o0 a b c o7 a b c", True)[1]
    assert PARITY.score("2 a b c", "o1 a b c o1 a b c", True)[1]
    assert not PARITY.score("2 a b c", "o1 a b c o0 a b c", True)[1]


# -- the policies and the sampler -------------------------------------------------------------------------------------


def test_the_mixtures_student_is_a_gaussian_over_the_bins() -> None:
    policy = mixture.GaussianPolicy(mixture.ToyConfig(2), seed=1)
    mean, sd = policy.model.mean.item(), math.exp(policy.model.log_sd.item())
    expected = (-0.5 * ((mixture.X - mean) / sd) ** 2).softmax(0)
    torch.testing.assert_close(policy.probabilities(), expected, rtol=1e-4, atol=1e-7)


def test_a_bin_is_the_same_to_the_teacher_and_to_the_student() -> None:
    teacher = mixture.TEACHERS[0]
    drawn = [int(g.teacher.text) for g in teacher.groups(BINS, 20_000, seed=0)]
    tokens = [g.teacher.token_ids for g in teacher.groups(BINS, 20_000, seed=0)]
    assert tokens == [(mixture.FIRST + i,) for i in drawn]
    share = torch.tensor(drawn).bincount(minlength=mixture.BINS) / len(drawn)
    assert mixture.kl(share, teacher.probabilities) < 0.01
    assert [BINS.vocabulary[word] for word in mixture.WORDS] == list(range(mixture.FIRST, len(BINS.vocabulary)))


def test_with_the_oracle_gadcores_gradient_is_that_of_the_reverse_kl() -> None:
    teacher = mixture.TEACHERS[0]
    policy = mixture.GaussianPolicy(mixture.ToyConfig(2), seed=0)
    student = student_of(policy, normalise_advantage=False)
    (group,) = teacher.groups(BINS, 1, seed=0)
    # As many samples of every bin as are expected of 10 000, so that no chance is left.
    q = policy.probabilities()
    for i, expected in enumerate((10_000 * q).round().int().tolist()):
        sample = Response(mixture.WORDS[i], (mixture.FIRST + i,), False, (q[i].log().item(),))
        group.samples += [sample] * expected
    oracle = mixture_runs.oracle(toy.settings({}), teacher, policy)
    student.grpo_backward([group], oracle.score([group], backward=False).rewards)
    sampled = [policy.model.mean.grad.item(), policy.model.log_sd.grad.item()]

    policy.zero_grad()
    hidden = policy.model(torch.zeros(1, 1, dtype=torch.int64)).last_hidden_state[0]
    log_q = policy.lm_head(hidden)[0, mixture.FIRST :].log_softmax(-1)
    (log_q.exp() * (log_q - teacher.probabilities.clamp_min(1e-12).log())).sum().backward()
    exact = [policy.model.mean.grad.item(), policy.model.log_sd.grad.item()]
    assert sampled == pytest.approx(exact, rel=0.01)


def test_the_languages_student_sees_no_earlier_token_of_its_response() -> None:
    model = language.policy(WORDS, seed=0)
    student = student_of(model)
    batch = GroupedBatch.of([GroupTokens((3, 6, 7, 8, 1), ((14, 6, 7, 8), (15, 6, 7, 8)))], last_tokens=False)
    first, second = student.predicting_states(model, batch).split(4)
    torch.testing.assert_close(first[[0, 2, 3]], second[[0, 2, 3]])
    assert not torch.allclose(first[1], second[1])


def test_the_sampler_draws_from_the_student_by_a_requests_seed_alone() -> None:
    model = language.policy(WORDS, seed=0)
    student = student_of(model)
    groups = STYLES.groups(WORDS, 3, 5, first=language.LETTERS)
    requests = [SampleRequest(g.prompt.token_ids, 4, 10 + i) for i, g in enumerate(groups)]
    engine = toy.ToyEngine(model, WORDS)
    together = engine.generate(requests, temperature=1.0, max_tokens=9)
    alone = [engine.generate([request], temperature=1.0, max_tokens=9)[0] for request in requests]
    assert [[s.token_ids for s in row] for row in together] == [[s.token_ids for s in row] for row in alone]
    for group, samples in zip(groups, together, strict=True):
        found = language_runs.log_q(student, [Group(group.prompt, s) for s in samples])
        assert [sum(s.logprobs) for s in samples] == pytest.approx(found, abs=1e-3)
        assert all(len(s.token_ids) <= 9 and s.finished == (s.token_ids[-1] == WORDS.end_id) for s in samples)


@pytest.mark.parametrize(("prompts", "samples"), [(3, 4), (70, 1), (70, 2)])
def test_the_languages_own_sampler_draws_what_the_model_itself_would(prompts, samples) -> None:
    """Few prompts: by words at several positions at once; many: a token a sample."""
    model = language.policy(WORDS, seed=0)
    student_of(model)
    groups = STYLES.groups(WORDS, prompts, 5, first=language.LETTERS)
    requests = [SampleRequest(g.prompt.token_ids, samples, 10 + i) for i, g in enumerate(groups)]
    slow, fast = (
        engine(model, WORDS).generate(requests, temperature=1.0, max_tokens=language.LONGEST)
        for engine in (toy.ToyEngine, language_engine.LanguageEngine)
    )
    assert [[s.token_ids for s in row] for row in slow] == [[s.token_ids for s in row] for row in fast]
    for one, other in zip(itertools.chain(*slow), itertools.chain(*fast), strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_arms_that_share_a_warmup_begin_where_it_ended(monkeypatch) -> None:
    monkeypatch.setattr(language_runs, "FRESH", FreshSettings(steps=1))
    experiment = language_runs.Experiment(STYLES, 0, shorter=100)
    first, frozen, again = (experiment.run(arm)["curve"] for arm in ("gad", "frozen", "gad"))
    assert [p for p in frozen if p["stage"] == "warmup"] == [p for p in first if p["stage"] == "warmup"]
    assert [p["reverse_kl"] for p in again] == pytest.approx([p["reverse_kl"] for p in first], rel=1e-4)
    assert [p["reverse_kl"] for p in frozen] != [p["reverse_kl"] for p in first]
