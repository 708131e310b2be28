"""gadcore's own GAD step: the loop body of gadcore.algorithm.gad, its phases on the clock.

Its discriminator phase is one pass: rewards, BT loss and gradient together.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedModel

from bench.step import flops
from bench.step.flops import Lengths, Widths
from bench.step.problem import Problem
from bench.step.worker import Channel, Clock, Meter, arguments, gradients_of, serve, write_findings
from gadcore import cpu
from gadcore.data.groups import Group
from gadcore.models.discriminator import Discriminator
from gadcore.models.loading import load_causal_lm, load_discriminator, load_tokenizer
from gadcore.models.student import Student
from gadcore.rollout.engine import Engine, SampleRequest
from gadcore.rollout.sampler import Sampler
from gadcore.rollout.vllm import VLLMEngine
from gadcore.rollout.weights import PlainWeights

CPU = torch.device("cpu")


def engine_of(problem: Problem, model: PreTrainedModel) -> VLLMEngine:
    """gadcore's engine; where the problem forces lengths, one that never samples an end marker."""
    engine = VLLMEngine(problem.config(), problem.student, model, problem.template())
    if problem.forced:
        parameters = engine.vllm.SamplingParams
        engine.vllm = SimpleNamespace(SamplingParams=lambda **kw: parameters(**kw, min_tokens=kw["max_tokens"]))
    return engine


def timed_sampler(problem: Problem, engine: Engine, model: PreTrainedModel, clock: Clock) -> Sampler:
    """A sampler whose times are taken by the names of the table; its engine is left awake."""
    names = {"synchronise": "weight update", "rollout": "generate"}
    return Sampler(
        engine,
        PlainWeights(model),
        temperature=problem.temperature,
        max_tokens=problem.max_response,
        states=lambda state: clock(names[state]),
    )


def requests(groups: Sequence[Group], samples: int, step: int) -> list[SampleRequest]:
    return [SampleRequest(g.prompt.token_ids, samples, 1000 * step + g.prompt.index) for g in groups]


def check_lengths(problem: Problem, groups: Sequence[Group]) -> int:
    """Sampled tokens of a step; raises where they are not what the problem forces."""
    lengths = [len(sample.token_ids) for group in groups for sample in group.samples]
    if problem.forced and set(lengths) != {problem.max_response}:
        raise RuntimeError(f"responses must have {problem.max_response} tokens, have {sorted(set(lengths))}")
    return sum(lengths)


class Ours:
    """Everything that a run of gadcore builds for the GAD stage."""

    def __init__(self, problem: Problem, clock: Clock) -> None:
        # As gadcore.train.build does; what the pool keeps between the turns of the two sides counts in the peak.
        cpu.install()
        config = problem.config()
        self.problem, self.config, self.clock = problem, config, clock
        template = problem.template()
        micro_batch_tokens = config.schedule.micro_batch_tokens
        self.student = Student(
            load_causal_lm(problem.student, "float32", CPU),
            config.student,
            config.algorithm,
            temperature=problem.temperature,
            micro_batch_tokens=micro_batch_tokens,
        )
        tokenizer = load_tokenizer(problem.discriminator)
        self.discriminator = Discriminator(
            load_discriminator(
                problem.discriminator, "float32", device=CPU, seed=0, end_id=template.end_id, tokenizer=tokenizer
            ),
            template,
            config.discriminator,
            same_vocabulary=True,
            micro_batch_tokens=micro_batch_tokens,
        )
        self.engine = engine_of(problem, self.student.model)
        self.sampler = timed_sampler(problem, self.engine, self.student.model, clock)
        self.student.freeze_reference()
        clock.wrap(self.student, "logprobs", lambda model, *_: self._owner(model))

    def models(self) -> list[PreTrainedModel]:
        reference = self.student.reference
        return [self.student.model, self.discriminator.model, *([reference] if reference is not None else [])]

    def allocate(self) -> None:
        """The optimizers' states, as gadcore.train.build makes them before the first step."""
        self.student.optimizer.allocate()
        self.discriminator.optimizer.allocate()

    def _owner(self, model: Any) -> str:
        return "reference" if model is self.student.reference else "policy"

    def step(self, number: int, findings: Any = None) -> dict[str, Any]:
        clock, config, problem = self.clock, self.config, self.problem
        groups = problem.batch(number)
        drawn = self.sampler.generate(requests(groups, problem.samples, number))
        with clock("generate"):
            self.engine.sleep()
        for group, samples in zip(groups, drawn, strict=True):
            group.samples = samples
        with clock("discriminator"):
            scores = self.discriminator.score(groups, backward=True)
        gradients = None if findings is None else gradients_of(self.discriminator.model)
        with clock("optimizer"):
            self.discriminator.step()
        with clock("policy"):
            stats = self.student.grpo_backward(groups, scores.sample_scores)
        if gradients is not None:
            write_findings(
                findings,
                groups=[self._tokens(group) for group in groups],
                rewards=scores.rewards,
                losses={"policy": stats.loss, "discriminator": scores.loss},
                student=self.student.model,
                discriminator=gradients,
            )
        with clock("optimizer"):
            self.student.step(config.student.lr)
        return {"response_tokens": check_lengths(problem, groups), "flops": self._flops(groups)}

    def _tokens(self, group: Group) -> dict[str, Any]:
        (scored,) = self.discriminator.tokens([group])
        return {
            "prompt": group.prompt.token_ids,
            "samples": [sample.token_ids for sample in group.samples],
            "d_prompt": scored.prompt,
            "d_responses": scored.responses,
        }

    def _flops(self, groups: Sequence[Group]) -> dict[str, int]:
        tokens = [self._tokens(group) for group in groups]
        return flops.step(
            [Lengths(len(t["prompt"]), tuple(map(len, t["samples"]))) for t in tokens],
            [Lengths(len(t["d_prompt"]), tuple(map(len, t["d_responses"]))) for t in tokens],
            Widths.of(self.student.model.config),
            Widths.of(self.discriminator.model.config),
        )


def main() -> None:
    channel, given, clock = Channel(), arguments(), Clock()
    ours = Ours(given.problem, clock)
    torch.set_num_threads(given.threads)
    meter = Meter(clock, given.threads, *ours.models())
    # After the meter has seen the level without them, as it does on the other sides.
    ours.allocate()
    serve(channel, meter, lambda number, check: ours.step(number, given.findings if check else None))
    ours.engine.close()


if __name__ == "__main__":
    main()
