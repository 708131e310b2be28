"""One side of the suite `rollout` in a process of its own: tokens per second for several numbers of rows.

ours: gadcore's engine with its defaults. vllm: vLLM as it comes, which compiles its model. vllm eager: the same without
compilation. hf: gadcore's engine on generate(), a prompt at a time. All of them sample the same prompts, N = 8, with
lengths forced equal, and the cost of an update of the weights (an empty prefix cache) before every batch.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from bench.step.ours import check_lengths, engine_of, requests
from bench.step.problem import Problem
from bench.step.worker import Channel
from gadcore.models.loading import load_causal_lm
from gadcore.rollout.engine import Engine
from gadcore.rollout.hf import HFEngine
from gadcore.rollout.sampler import Sampler
from gadcore.rollout.weights import PlainWeights

CPU = torch.device("cpu")
# Batches of each number of rows that are timed; before the first, one of the smallest that is not.
REPEATS = 2

Generate = Callable[[list[Any], int], int]


def ours(problem: Problem) -> Generate:
    model = load_causal_lm(problem.student, "float32", CPU)
    return _engine(problem, engine_of(problem, model), model)


def hf(problem: Problem) -> Generate:
    model = load_causal_lm(problem.student, "float32", CPU)
    template = problem.template()
    # An end marker that no vocabulary holds: nothing is sampled to an early end.
    template.end_id = -1
    return _engine(problem, HFEngine(problem.config(), problem.student, model, template), model)


def _engine(problem: Problem, engine: Engine, model: PreTrainedModel) -> Generate:
    # Awake between batches, as the other sides are; an update of shared weights is an empty prefix cache.
    sampler = Sampler(
        engine,
        PlainWeights(model),
        temperature=problem.temperature,
        max_tokens=problem.max_response,
        states=lambda state: nullcontext(),
    )

    def generate(groups: list[Any], step: int) -> int:
        drawn = sampler.generate(requests(groups, problem.samples, step))
        for group, samples in zip(groups, drawn, strict=True):
            group.samples = samples
        return check_lengths(problem, groups)

    return generate


def stock(problem: Problem, *, eager: bool) -> Generate:
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=problem.student,
        dtype="float32",
        max_model_len=problem.max_prompt + problem.max_response,
        enforce_eager=eager,
        disable_log_stats=True,
        use_tqdm_on_load=False,
    )

    def generate(groups: list[Any], step: int) -> int:
        llm.reset_prefix_cache()
        wanted = requests(groups, problem.samples, step)
        length = problem.max_response
        parameters = [
            SamplingParams(
                n=r.n,
                temperature=problem.temperature,
                max_tokens=length,
                min_tokens=length,
                seed=r.seed,
                logprobs=0,
                detokenize=False,
            )
            for r in wanted
        ]
        prompts = [{"prompt_token_ids": list(r.prompt_ids)} for r in wanted]
        outputs = llm.generate(prompts, parameters, use_tqdm=False)
        return sum(len(sample.token_ids) for output in outputs for sample in output.outputs)

    return generate


SIDES: dict[str, Callable[[Problem], Generate]] = {
    "ours": ours,
    "vllm": lambda problem: stock(problem, eager=False),
    "vllm eager": lambda problem: stock(problem, eager=True),
    "hf": hf,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("problem", type=Path)
    parser.add_argument("threads", type=int)
    parser.add_argument("prompts", type=int, nargs="+")
    options = parser.parse_args()
    channel = Channel()
    torch.set_num_threads(options.threads)
    problem = Problem.read(options.problem)
    generate = SIDES[options.side](problem)
    torch.set_num_threads(options.threads)
    groups = problem.batch(0)
    generate(groups[: min(options.prompts)], 0)
    rates = {}
    for prompts in options.prompts:
        runs = []
        for repeat in range(1, REPEATS + 1):
            start = time.perf_counter()
            tokens = generate(groups[:prompts], repeat)
            runs.append(tokens / (time.perf_counter() - start))
        rates[prompts * problem.samples] = runs
    channel.tell(rates)


if __name__ == "__main__":
    main()
