"""Health: warnings on constructed series, once per onset, and none on a healthy run."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest

from gadcore.data.groups import Group, Prompt, Response
from gadcore.models.discriminator import Scores
from gadcore.record.health import TAIL, WINDOW, HealthMonitor, warnings, watched
from gadcore.report import findings
from gadcore.train.metrics import sample_traits
from gadcore.train.step import StepResult

Row = dict[str, Any]


def healthy(warmup: int = 40, gad: int = 120) -> list[Row]:
    """A run as it should be: D guesses at first and tells most pairs at the end of the warmup; its lead stays small."""
    noise = random.Random(0)
    rows = []
    for step in range(1, warmup + gad + 1):
        share = min(step / warmup, 1.0)
        row = {
            "stage": "warmup" if step <= warmup else "gad",
            "step": step,
            "discriminator/accuracy": 0.5 + 0.35 * share + noise.uniform(-0.05, 0.05),
            "discriminator/margin": 1.5 * share + noise.uniform(-0.1, 0.1),
            "reward/std": 0.6 + noise.uniform(-0.1, 0.1),
            "reward/length_corr": noise.uniform(-0.3, 0.3),
            "reward/finished_gap": 0.3 + noise.uniform(-0.1, 0.1),
            "reward/finished_corr": noise.uniform(0.0, 0.5),
            "length/ratio": (3.0 if step < warmup / 2 else 1.1) + noise.uniform(-0.1, 0.1),
            "length/cut_share": (0.8 if step < warmup / 2 else 0.05) + noise.uniform(0, 0.02),
            "samples/repetition": 0.02,
        }
        if step > warmup:
            row |= {"student/loss": 0.01, "sampler/logprob_diff_mean": 1e-4, "sampler/kl": 2e-8 * noise.uniform(0.5, 9)}
        rows.append(row)
    return rows


def test_a_healthy_run_gets_no_warning_at_any_step() -> None:
    monitor = watched(healthy())
    assert monitor.episodes == [] and monitor.current() == [] and monitor.past() == []


CASES: list[tuple[str, Callable[[int], Row], str]] = [
    (
        "The discriminator is never fooled",
        lambda i: {"discriminator/accuracy": 0.995, "discriminator/margin": 1.5 + 0.2 * i},
        "discriminator.margin_cap",
    ),
    (
        "The discriminator only guesses",
        lambda i: {"discriminator/accuracy": 0.51, "discriminator/margin": 0.3},
        "gate.enabled",
    ),
    (
        "The discriminator only guesses",
        lambda i: {"discriminator/accuracy": 0.6, "discriminator/margin": 0.01},
        "algorithm.discriminator_steps",
    ),
    ("Rewards do not differ within a group", lambda i: {"reward/std": 1e-5}, "algorithm.advantage_std_floor"),
    ("Reward goes with length", lambda i: {"reward/length_corr": 0.8}, "algorithm.kl_coef"),
    ("Reward goes with length", lambda i: {"reward/length_corr": -0.8}, "algorithm.kl_coef"),
    ("Responses are too long", lambda i: {"length/ratio": 2.5}, "algorithm.kl_coef"),
    ("Responses are too short", lambda i: {"length/ratio": 0.3}, "student.lr"),
    (
        "The discriminator scores by the end marker",
        lambda i: {"reward/finished_corr": 0.95, "reward/finished_gap": 3.0},
        "data.max_response_tokens",
    ),
    ("Many responses are cut", lambda i: {"length/cut_share": 0.6}, "data.max_response_tokens"),
    ("Samples repeat themselves", lambda i: {"samples/repetition": 0.5}, "student.lr"),
    ("Sampler and trainer disagree", lambda i: {"sampler/logprob_diff_mean": 0.1}, "rollout.dtype"),
    ("Sampler and trainer disagree", lambda i: {"sampler/logprob_diff_mean": 0.1}, "rollout.prefix_caching"),
    ("Sampler and trainer drift apart", lambda i: {"sampler/kl": 1e-4 * 1.05**i}, "rollout.head_dtype"),
    ("Sampler and trainer drift apart", lambda i: {"sampler/kl": 5e-3}, "algorithm.importance_cap"),
    ("Numbers that are not finite", lambda i: {"student/loss": math.nan}, "learning rate"),
]


@pytest.mark.parametrize(("title", "sick", "setting"), CASES)
def test_a_sick_run_is_told_once_with_the_setting_to_look_at(title, sick, setting) -> None:
    rows = healthy()
    onset = 100
    for i, row in enumerate(rows[onset:]):
        row |= sick(i)
    monitor, begun = HealthMonitor(), []
    for row in rows:
        begun += [(row["step"], warning) for warning in monitor.look(row)]
    (step, warning) = begun[0]
    assert [w.title for _, w in begun] == [title]
    assert onset < step <= onset + TAIL + 20
    assert setting in warning.text
    assert [w.title for w in findings.warnings(rows)] == [title]


def test_a_flat_margin_is_no_saturation() -> None:
    rows = healthy()
    for row in rows[100:]:
        row |= {"discriminator/accuracy": 0.995, "discriminator/margin": 4.0}
    # The jump itself is growth; after it there is none.
    assert watched(rows).current() == [] and [e.last is not None for e in watched(rows).past()] == [True]


def test_a_sampler_that_is_as_far_off_as_ever_does_not_drift() -> None:
    rows = [row | {"sampler/kl": 2e-3 + 1e-3 * (i % 3)} for i, row in enumerate(healthy())]
    assert watched(rows).episodes == []


def test_samples_of_older_weights_must_have_other_log_probs() -> None:
    rows = [row | {"sampler/kl": 1e-3 * i, "sampler/logprob_diff_mean": 0.1} for i, row in enumerate(healthy())]
    assert {e.warning.title.split()[-1] for e in watched(rows).episodes} == {"disagree", "apart"}
    assert watched([row | {"sampler/staleness": 1} for row in rows]).episodes == []


@pytest.mark.parametrize(
    "key", ["reward/length_corr", "reward/finished_corr", "length/cut_share", "samples/repetition"]
)
def test_the_warmup_is_not_judged_by_rewards_that_nobody_learns_from(key: str) -> None:
    rows = [row | {key: 0.95, "reward/finished_gap": 1.0} for row in healthy(gad=0)]
    assert watched(rows).episodes == []


def test_an_illness_that_passes_is_kept_and_a_new_one_is_told_anew() -> None:
    rows = healthy(gad=400)
    for row in (*rows[100:150], *rows[300:350]):
        row["reward/length_corr"] = 0.9
    monitor = HealthMonitor()
    begun = [row["step"] for row in rows for _ in monitor.look(row)]
    assert len(begun) == 2 and 100 < begun[0] < 150 and 300 < begun[1] < 350
    first, second = monitor.episodes
    assert first.last is not None and 150 <= first.last < 180 and second.last is not None
    (past,) = findings.warnings(rows)
    assert past.title == f"Reward goes with length, from step {second.first} to {second.last}"


def test_a_flickering_value_is_told_once() -> None:
    rows = healthy()
    for i, row in enumerate(rows[60:]):
        row["reward/length_corr"] = 0.65 if i % 8 < 6 else 0.1
    monitor = HealthMonitor()
    assert sum(len(monitor.look(row)) for row in rows) == 1


def test_a_monitor_that_is_fed_the_old_rows_goes_on_as_the_first_did() -> None:
    rows = healthy()
    for row in rows[90:]:
        row["length/ratio"] = 4.0
    whole, resumed = HealthMonitor(), watched(rows[:110])
    for row in rows:
        whole.look(row)
    assert [warning for row in rows[110:] for warning in resumed.look(row)] == []
    assert resumed.episodes == whole.episodes


def test_too_few_rows_say_nothing() -> None:
    assert warnings([{"stage": "gad", "step": i, "reward/std": 0.0} for i in (1, 2)]) == []
    assert warnings([]) == []


def test_old_rows_leave_the_window() -> None:
    rows = healthy(gad=2 * WINDOW)
    rows[60]["student/loss"] = math.inf
    monitor = watched(rows)
    assert [e.warning.title for e in monitor.past()] == ["Numbers that are not finite"] and monitor.current() == []


def group(*samples: tuple[str, bool]) -> Group:
    prompt = Prompt(0, ({"role": "user", "content": "x"},), (1,))
    return Group(prompt, Response("y", (1,), True), [Response(text, (1,), finished) for text, finished in samples])


def traits_of(groups: list[Group], *rewards: list[float]) -> dict[str, float]:
    scores = Scores.of(list(rewards), [0.0] * len(rewards))
    return sample_traits(StepResult("gad", 1, groups, scores=scores))


def test_the_gap_of_the_end_marker_is_within_groups() -> None:
    """Prompts of another level are no gap: the groups' means are 1.5 and 10.5, in both of them finished is 1 more."""
    groups = [group(("a", True), ("b", False)), group(("c", False), ("d", True))]
    traits = traits_of(groups, [2.0, 1.0], [10.0, 11.0])
    assert traits["reward/finished_gap"] == pytest.approx(1.0)
    assert traits["reward/finished_corr"] == pytest.approx(1.0)
    none = traits_of(groups, [1.0, 1.0], [9.0, 9.0])
    assert none["reward/finished_gap"] == none["reward/finished_corr"] == 0.0


@pytest.mark.parametrize("finished", [True, False])
def test_one_kind_alone_has_no_gap(finished: bool) -> None:
    traits = traits_of([group(("a", finished), ("b", finished))], [1.0, 2.0])
    assert set(traits) == {"samples/repetition"}


def test_repetition_is_the_mean_over_samples() -> None:
    # "a b a b a b": 4-grams abab baba abab, one of three repeated; the other sample has none.
    traits = traits_of([group(("a b a b a b", True), ("one two three four five", True))], [1.0, 2.0])
    assert traits["samples/repetition"] == pytest.approx(1 / 6)
