"""Which comparisons there are: every op of ours beside its opponents, on inputs of given sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernels.compare import Direction, KernelCase, Setup
from bench.kernels.opponents import head, small
from bench.kernels.opponents.liger import liger_grpo
from bench.kernels.opponents.problem import Expected, HeadProblem, grpo_expected, head_problem, logprob_expected
from bench.kernels.opponents.trl import trl_grpo, trl_logprob
from bench.runner import Rounds, Side
from gadcore.kernels.bt_score import bt_score
from gadcore.kernels.cpu.linear_few_rows import linear_few_rows
from gadcore.kernels.grpo_ratio_loss import grpo_ratio_loss
from gadcore.kernels.linear_grpo_loss import linear_grpo_loss
from gadcore.kernels.linear_logprob import linear_logprob

FORWARD: Direction = "forward"
BOTH: Direction = "forward + backward"

# Names of Size.opponents.
NAIVE, COMPILED, CUT, TRL, LIGER = "naive", "compiled", "cut-cross-entropy", "TRL", "Liger"


@dataclass(frozen=True)
class Size:
    """A head to measure with T = tokens, and beside whom.

    close: rounds beside the bare products, where a few percent matter; wide: beside the rest. length: tokens of a
    response. logprob_backward: also linear_logprob forward + backward.
    """

    tokens: int
    width: int
    vocabulary: int
    opponents: frozenset[str]
    close: Rounds
    wide: Rounds
    length: int = 128
    logprob_backward: bool = True


def head_cases(size: Size, setup: Setup) -> Iterator[KernelCase]:
    """linear_grpo_loss and linear_logprob. A case must be done with before the next: each holds much memory."""
    problem = head_problem(
        size.tokens, size.width, size.vocabulary, length=size.length, dtype=setup.dtype, device=setup.device
    )
    yield from _grpo_cases(problem, size, setup)
    yield from _logprob_cases(problem, size, setup, backward=False)
    if size.logprob_backward:
        yield from _logprob_cases(problem, size, setup, backward=True)


def _config(problem: HeadProblem, size: Size, **more: Any) -> dict[str, Any]:
    return {"temperature": problem.temperature, "kl_coef": problem.kl_coef, "response_length": size.length, **more}


def _grpo_cases(problem: HeadProblem, size: Size, setup: Setup) -> Iterator[KernelCase]:
    expected = grpo_expected(problem)

    def case(others: list[Side], rounds: Rounds, *, entropy: bool = False) -> KernelCase:
        ours = ours_grpo(problem, setup, entropy=entropy)
        config = _config(problem, size, entropy=entropy)
        return KernelCase("linear_grpo_loss", BOTH, problem.shape, ours, others, expected, rounds, config)

    yield case([head.bare_products(problem, backward=True)], size.close)
    others: dict[str, Callable[[], Side]] = {
        NAIVE: lambda: head.grpo_side("naive torch", problem, head.naive_logprob(problem)),
        COMPILED: lambda: head.compiled_grpo(problem),
        CUT: lambda: head.grpo_side("cut-cross-entropy", problem, _cut(problem, setup), compiled=True),
        LIGER: lambda: liger_grpo(problem),
    }
    wanted = [make() for name, make in others.items() if name in size.opponents]
    if wanted:
        yield case(wanted, size.wide)
    if TRL in size.opponents:
        # TRL always computes the entropy in training, so here ours does too.
        yield case([trl_grpo(problem)], size.wide, entropy=True)


def _logprob_cases(problem: HeadProblem, size: Size, setup: Setup, *, backward: bool) -> Iterator[KernelCase]:
    expected = logprob_expected(problem, gradients=backward)
    ours = ours_logprob(problem, setup, backward=backward)

    def case(others: list[Side], rounds: Rounds) -> KernelCase:
        direction = BOTH if backward else FORWARD
        return KernelCase(
            "linear_logprob", direction, problem.shape, ours, others, expected, rounds, _config(problem, size)
        )

    yield case([head.bare_products(problem, backward=backward)], size.close)
    others: dict[str, Callable[[], Side]] = {
        NAIVE: lambda: head.logprob_side("naive torch", problem, head.naive_logprob(problem), backward=backward),
        COMPILED: lambda: head.compiled_logprob(problem, backward=backward),
        CUT: lambda: head.logprob_side(
            "cut-cross-entropy", problem, _cut(problem, setup), backward=backward, compiled=True
        ),
        TRL: lambda: head.logprob_side("TRL", problem, trl_logprob(problem), backward=backward),
    }
    wanted = [make() for name, make in others.items() if name in size.opponents]
    if wanted:
        yield case(wanted, size.wide)


def _cut(problem: HeadProblem, setup: Setup) -> Callable[[], Tensor]:
    return head.cut_cross_entropy_logprob(problem, "torch_compile" if setup.device == "cpu" else "cce")


def ours_grpo(problem: HeadProblem, setup: Setup, *, entropy: bool) -> Side:
    def call() -> dict[str, Tensor]:
        loss, _ = linear_grpo_loss(
            problem.hidden,
            problem.weight,
            problem.targets,
            problem.groups,
            rewards=problem.rewards,
            ref_logprob=problem.ref_logprob,
            temperature=problem.temperature,
            clip_low=problem.clip,
            clip_high=problem.clip,
            kl_coef=problem.kl_coef,
            denominator=problem.tokens,
            return_entropy=entropy,
            impl=setup.impl,
        )
        loss.backward()
        return {"loss": loss.detach(), **head.gradients(problem)}

    return Side("ours", call, problem.clear)


def ours_logprob(problem: HeadProblem, setup: Setup, *, backward: bool) -> Side:
    def logprob() -> Tensor:
        return linear_logprob(
            problem.hidden, problem.weight, problem.targets, temperature=problem.temperature, impl=setup.impl
        )

    return head.logprob_side("ours", problem, logprob, backward=backward)


def score_case(groups: int, samples: int, length: int, width: int, rounds: Rounds, setup: Setup) -> KernelCase:
    """bt_score: G groups of a teacher and N samples of `length` tokens each."""
    problem = small.score_problem(groups, samples, length, width, dtype=setup.dtype, device=setup.device)

    def call() -> dict[str, Tensor]:
        result = bt_score(
            problem.hidden,
            problem.last_index,
            problem.weight,
            problem.bias,
            problem.groups,
            denominator=problem.pairs,
            impl=setup.impl,
        )
        d_hidden, d_weight, _ = torch.autograd.grad(result.loss, problem.leaves)
        outputs = {"scores": result.scores.detach(), "loss": result.loss.detach()}
        return outputs | {"d_hidden": d_hidden, "d_weight": d_weight}

    sides = Side("ours", call), [small.naive_score(problem)]
    return KernelCase("bt_score", BOTH, problem.shape, *sides, small.score_expected(problem), rounds)


def ratio_case(tokens: int, rounds: Rounds, setup: Setup) -> KernelCase:
    """grpo_ratio_loss over T tokens, float32 whatever the setup's dtype: log-probabilities always are."""
    problem = small.ratio_problem(tokens, device=setup.device)

    def call() -> dict[str, Tensor]:
        loss, _ = grpo_ratio_loss(
            problem.logprob,
            problem.advantages,
            ref_logprob=problem.ref_logprob,
            clip_low=problem.clip,
            clip_high=problem.clip,
            kl_coef=problem.kl_coef,
            denominator=tokens,
            impl=setup.impl,
        )
        (d_logprob,) = torch.autograd.grad(loss, problem.logprob)
        return {"loss": loss.detach(), "d_logprob": d_logprob}

    sides = Side("ours", call), [small.naive_ratio(problem)]
    expected = small.ratio_expected(problem)
    return KernelCase("grpo_ratio_loss", BOTH, {"T": tokens}, *sides, expected, rounds, dtype=torch.float32)


def few_rows_case(rows: int, width: int, outputs: int, copies: int, rounds: Rounds, setup: Setup) -> KernelCase:
    """linear_few_rows with M = rows, K = width, N = outputs, over `copies` weights in turn."""
    weights = small.Weights(copies, outputs, width)
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(1))

    @torch.inference_mode()
    def ours() -> dict[str, Tensor]:
        return {"y": linear_few_rows(x, weights.take(), impl=setup.impl)}

    @torch.inference_mode()
    def theirs() -> dict[str, Tensor]:
        return {"y": F.linear(x, weights.take())}

    return KernelCase(
        "linear_few_rows",
        FORWARD,
        {"M": rows, "K": width, "N": outputs},
        Side("ours", ours),
        [Side("F.linear", theirs)],
        {"y": Expected(x.double() @ weights.all[0].double().T)},
        rounds,
        {"weights_in_turn": copies},
    )
