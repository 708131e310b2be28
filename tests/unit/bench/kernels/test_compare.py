"""A comparison shows no speed where a side is wrong."""

from __future__ import annotations

import pytest
import torch

from bench import peak
from bench.kernels.compare import KernelCase, Setup, line, measure
from bench.kernels.opponents.problem import Expected, grpo_expected, head_problem
from bench.runner import Rounds, Side, wall

ONCE = Rounds(1, 1, 0.0)
REFERENCE = Setup("kernels", "reference", torch.float32, "cpu", 1, wall, peak.extra_peak)


def case(got: float) -> KernelCase:
    right = torch.ones(3)
    ours = Side("ours", lambda: {"y": torch.full((3,), got)})
    theirs = Side("theirs", lambda: {"y": right})
    return KernelCase("op", "forward", {"T": 3}, ours, [theirs], {"y": Expected(right.double())}, ONCE)


@pytest.mark.parametrize(("got", "gate"), [(1.0, "pass"), (1.001, "fail"), (float("nan"), "fail")])
def test_gate_fails_where_ours_is_wrong(got: float, gate: str) -> None:
    (measured,) = measure(case(got), REFERENCE)
    assert measured.gate == gate
    assert (measured.speed_up is None) == (gate == "fail")
    assert ("x" in line(measured)) == (gate == "pass")


def test_gate_fails_where_the_opponent_does_not_do_the_same() -> None:
    wrong = case(1.0)
    wrong.opponents[0] = Side("theirs", lambda: {"y": torch.zeros(3)})
    assert measure(wrong, REFERENCE)[0].gate == "fail"


def test_gate_notices_a_wrong_gradient_and_a_wrong_kl_term() -> None:
    problem = head_problem(64, 32, 100, samples=4, length=8)
    expected = grpo_expected(problem)
    problem.kl_coef *= 1.01
    changed = grpo_expected(problem)
    for name in ("loss", "d_hidden", "d_weight"):
        assert expected[name].error(changed[name].value) > 1e-5


def test_inputs_are_the_same_every_time() -> None:
    first, second = (head_problem(64, 32, 100, samples=4, length=8) for _ in range(2))
    assert torch.equal(first.hidden, second.hidden) and torch.equal(first.ref_logprob, second.ref_logprob)
    with pytest.raises(ValueError, match="whole number of groups"):
        head_problem(65, 32, 100, samples=4, length=8)
