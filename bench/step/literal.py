"""The paper's reference schedule, literally: everything that its code repeats is repeated.

Padded rows [x | y] (prompts on the left, responses on the right), a pass of D for the rewards, a pass of G for old
log-probs, one of the reference, all with logits of every token; the policy's forward and backward pass with logits;
D trained on the teacher's row repeated for each of the N samples, beside the samples. Activations are not recomputed
(the paper's code does).

Sampling is gadcore's vLLM engine with PyTorch's own linear layers: gadcore's few-row ones are taken out again. vLLM's
repacked CPU layers cannot follow weight updates, so they are no choice for either side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from bench.step.ours import check_lengths, engine_of, requests, timed_sampler
from bench.step.problem import Problem
from bench.step.worker import EPSILON, Channel, Clock, Meter, arguments, serve, write_findings
from gadcore.config.settings import AlgorithmSettings

Tokens = Sequence[int]
Row = tuple[Tokens, Tokens]


@dataclass(frozen=True)
class Rows:
    """Padded rows. input_ids, mask, positions: [B, P + R]; response: [B, R], valid: [B, R] bool; last: [B]."""

    input_ids: Tensor
    mask: Tensor
    positions: Tensor
    response: Tensor
    valid: Tensor
    last: Tensor


def padded(rows: Sequence[Row], pad_id: int) -> Rows:
    """Prompts padded on the left, responses on the right."""
    longest_prompt, longest = max(len(x) for x, _ in rows), max(len(y) for _, y in rows)
    input_ids = torch.full((len(rows), longest_prompt + longest), pad_id)
    mask = torch.zeros_like(input_ids)
    for i, (x, y) in enumerate(rows):
        here = slice(longest_prompt - len(x), longest_prompt + len(y))
        input_ids[i, here] = torch.tensor([*x, *y])
        mask[i, here] = 1
    lengths = torch.tensor([len(y) for _, y in rows])
    return Rows(
        input_ids,
        mask,
        (mask.cumsum(1) - 1).clamp(min=0),
        input_ids[:, longest_prompt:],
        torch.arange(longest) < lengths[:, None],
        longest_prompt + lengths - 1,
    )


def load_student(problem: Problem, dtype: torch.dtype) -> PreTrainedModel:
    """The student as Hugging Face computes it; load_discriminator likewise."""
    return AutoModelForCausalLM.from_pretrained(problem.student, dtype=dtype, attn_implementation="sdpa").eval()


def load_discriminator(problem: Problem, dtype: torch.dtype) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(
        problem.discriminator, num_labels=1, dtype=dtype, attn_implementation="sdpa"
    ).eval()


def scores(model: PreTrainedModel, rows: Rows) -> Tensor:
    """D(x, y) of every row [B]."""
    hidden = model.base_model(
        input_ids=rows.input_ids, attention_mask=rows.mask, position_ids=rows.positions, use_cache=False
    ).last_hidden_state
    head: nn.Linear = model.score  # type: ignore[assignment]
    return head(hidden[torch.arange(len(hidden)), rows.last])[:, 0]


def logprobs(model: PreTrainedModel, rows: Rows, temperature: float) -> Tensor:
    """Log-probs [B, R] of the response tokens, from the logits of all tokens."""
    logits = model(
        input_ids=rows.input_ids, attention_mask=rows.mask, position_ids=rows.positions, use_cache=False
    ).logits
    width = rows.response.shape[1]
    logits = logits[:, -width - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(-1, rows.response[..., None])[..., 0]


def advantages(rewards: Tensor, epsilon: float = EPSILON) -> Tensor:
    """Of rewards [groups, N]."""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + epsilon)


def grpo_loss(
    logp: Tensor, old: Tensor, ref: Tensor, valid: Tensor, advantage: Tensor, algorithm: AlgorithmSettings
) -> Tensor:
    """Sum over tokens; logp, old, ref, valid: [B, R], advantage: [B]."""
    ratio, a = (logp - old).exp(), advantage[:, None]
    clipped = ratio.clamp(1 - algorithm.clip_low, 1 + algorithm.clip_high)
    loss = -torch.min(ratio * a, clipped * a)
    loss = loss + algorithm.kl_coef * ((ref - logp).exp() - (ref - logp) - 1)
    return loss.masked_fill(~valid, 0).sum()


def cuts(rows: Sequence[Row], pad_id: int, count: int) -> Iterator[tuple[slice, Rows]]:
    """`count` rows at a time."""
    for start in range(0, len(rows), count):
        here = slice(start, min(start + count, len(rows)))
        yield here, padded(rows[here], pad_id)


class Literal:
    """The schedule from rollouts on; `rows_at_once` rows in a pass.

    Used by the timed process in fp32 and by the gate in fp64.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        reference: PreTrainedModel,
        discriminator: PreTrainedModel,
        algorithm: AlgorithmSettings,
        clock: Clock,
        *,
        temperature: float,
        rows_at_once: int,
        pad_id: int,
    ) -> None:
        self.student, self.reference, self.discriminator = student, reference, discriminator
        self.algorithm, self.clock = algorithm, clock
        self.temperature, self.rows_at_once, self.pad_id = temperature, rows_at_once, pad_id

    def rewards(self, rows: Sequence[Row]) -> Tensor:
        with self.clock("discriminator score"), torch.no_grad():
            return torch.cat([scores(self.discriminator, cut) for _, cut in self._cuts(rows)])

    def policy_backward(self, rows: Sequence[Row], advantage: Tensor) -> float:
        """Adds the gradient of the GRPO loss; rows [x | y_s] and advantage [B]."""
        with self.clock("old log-probs"):
            old = self._logprobs(self.student, rows)
        with self.clock("reference"):
            ref = self._logprobs(self.reference, rows)
        tokens, total = sum(len(y) for _, y in rows), 0.0
        with self.clock("policy"):
            for i, (here, cut) in enumerate(self._cuts(rows)):
                logp = logprobs(self.student, cut, self.temperature)
                loss = grpo_loss(logp, old[i], ref[i], cut.valid, advantage[here], self.algorithm) / tokens
                loss.backward()
                total += loss.item()
        return total

    def _logprobs(self, model: PreTrainedModel, rows: Sequence[Row]) -> list[Tensor]:
        with torch.no_grad():
            return [logprobs(model, cut, self.temperature) for _, cut in self._cuts(rows)]

    def discriminator_backward(self, pairs: Sequence[tuple[Row, Row]]) -> float:
        """Adds the gradient of the BT loss over pairs ([x | y_t], [x | y_s])."""
        total, at_once = 0.0, max(1, self.rows_at_once // 2)
        with self.clock("discriminator train"):
            for start in range(0, len(pairs), at_once):
                cut = pairs[start : start + at_once]
                score = scores(self.discriminator, padded([*(t for t, _ in cut), *(s for _, s in cut)], self.pad_id))
                loss = F.softplus(score[len(cut) :] - score[: len(cut)]).sum() / len(pairs)
                loss.backward()
                total += loss.item()
        return total

    def _cuts(self, rows: Sequence[Row]) -> Iterator[tuple[slice, Rows]]:
        return cuts(rows, self.pad_id, self.rows_at_once)


class Schedule:
    """The timed process: sampler, literal passes, optimizers."""

    def __init__(self, problem: Problem, clock: Clock) -> None:
        self.problem, self.clock, config = problem, clock, problem.config()
        student, discriminator = load_student(problem, torch.float32), load_discriminator(problem, torch.float32)
        self.engine = engine_of(problem, student)
        self.sampler = timed_sampler(problem, self.engine, student, clock)
        for module in self.engine.engine_model.modules():
            if hasattr(module, "cpu_linear"):
                module.cpu_linear = F.linear  # type: ignore[assignment]
        self.passes = Literal(
            student,
            load_student(problem, torch.float32).requires_grad_(False),
            discriminator,
            config.algorithm,
            clock,
            temperature=problem.temperature,
            rows_at_once=problem.groups_at_once * problem.samples,
            pad_id=discriminator.config.pad_token_id,
        )
        self.optimizers = [
            torch.optim.AdamW(
                model.parameters(), lr=side.lr, betas=side.betas, weight_decay=side.weight_decay, fused=True
            )
            for model, side in ((student, config.student), (discriminator, config.discriminator))
        ]
        self.clip = config.student.grad_clip

    def step(self, number: int, findings: Any = None) -> dict[str, Any]:
        clock, problem, passes = self.clock, self.problem, self.passes
        groups = problem.batch(number)
        drawn = self.sampler.generate(requests(groups, problem.samples, number))
        with clock("generate"):
            self.engine.sleep()
        for group, samples in zip(groups, drawn, strict=True):
            group.samples = samples
        rows: list[Row] = [(g.prompt.token_ids, s.token_ids) for g in groups for s in g.samples]
        teachers: list[Row] = [(g.prompt.token_ids, g.teacher.token_ids) for g in groups for _ in g.samples]
        rewards = passes.rewards(rows).view(len(groups), problem.samples)
        policy = passes.policy_backward(rows, advantages(rewards).flatten())
        loss = passes.discriminator_backward(list(zip(teachers, rows, strict=True)))
        if findings is not None:
            write_findings(
                findings,
                groups=[
                    {
                        "prompt": g.prompt.token_ids,
                        "samples": [s.token_ids for s in g.samples],
                        "d_prompt": g.prompt.token_ids,
                        "d_responses": [g.teacher.token_ids, *(s.token_ids for s in g.samples)],
                    }
                    for g in groups
                ],
                rewards=rewards.tolist(),
                losses={"policy": policy, "discriminator": loss},
                student=passes.student,
                discriminator=passes.discriminator,
            )
        with clock("optimizer"):
            for model, optimizer in zip((passes.student, passes.discriminator), self.optimizers, strict=True):
                nn.utils.clip_grad_norm_(model.parameters(), self.clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return {"response_tokens": check_lengths(problem, groups)}


def main() -> None:
    channel, given, clock = Channel(), arguments(), Clock()
    schedule = Schedule(given.problem, clock)
    passes = schedule.passes
    torch.set_num_threads(given.threads)
    serve(
        channel,
        Meter(clock, given.threads, passes.student, passes.reference, passes.discriminator),
        lambda number, check: schedule.step(number, given.findings if check else None),
    )
    schedule.engine.close()


if __name__ == "__main__":
    main()
