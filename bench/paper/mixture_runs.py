"""The arms of the mixture: SeqKD, GAD, an oracle in D's place, a D frozen after the warmup."""

from __future__ import annotations

import copy
import time
from typing import Any

import torch

from bench.paper import toy
from bench.paper.mixture import FIRST, WORDS, BinScore, GaussianPolicy, Teacher, ToyConfig, measures
from gadcore.data.groups import Prompt, Response
from gadcore.models.discriminator import Discriminator
from gadcore.models.student import Student

ARMS = ("seqkd", "gad", "oracle", "frozen")
DATA = 4096
SETTINGS: dict[str, dict[str, Any]] = {
    "student": dict(lr=0.004, warmup_lr=0.02, seqkd_lr=0.02, grad_clip=10.0, weight_decay=0.0),
    "discriminator": dict(lr=0.05, grad_clip=10.0, weight_decay=0.0),
    "rollout": dict(engine="hf", group_size=8, temperature=1.0),
    "data": dict(max_prompt_tokens=8, max_response_tokens=1),
    "algorithm": dict(kl_coef=0.001),
    "schedule": dict(batch_size=32, warmup_steps=200, gad_steps=2500, seqkd_steps=1000),
}
EVERY = 50


def run(teacher: Teacher, arm: str, seed: int, *, shorter: int = 1) -> dict[str, Any]:
    """A row: the arm's measures, its curve and its seconds. shorter: divides the steps, for tests."""
    start = time.process_time()
    template = toy.WordTemplate(WORDS)
    values = copy.deepcopy(SETTINGS)
    for stage in ("warmup_steps", "gad_steps", "seqkd_steps"):
        values["schedule"][stage] //= shorter
    config = toy.settings({**values, "run": {"seed": seed}})
    groups = teacher.groups(template, DATA, seed)
    torch.manual_seed(seed)
    policy = GaussianPolicy(ToyConfig(2), seed)
    options = dict(micro_batch_tokens=10**6, activation_checkpointing="off")
    student = Student(policy, config.student, config.algorithm, temperature=1.0, **options)
    discriminator = Discriminator(
        BinScore(ToyConfig(64)), template, config.discriminator, same_vocabulary=True, **options
    )
    curve: list[dict[str, Any]] = []

    def look(row: dict[str, Any]) -> None:
        if row["stage_step"] % EVERY == 0:
            found = measures(policy.probabilities(), teacher)
            curve.append({"stage": row["stage"], "step": row["stage_step"], "reverse_kl": found["reverse_kl"]})
            if "discriminator/accuracy" in row:
                curve[-1]["d_accuracy"] = row["discriminator/accuracy"]

    if arm == "seqkd":
        toy.run(config, "seqkd", student, None, groups, template, look)
    else:
        toy.run(config, "warmup", student, discriminator, groups, template, look)
        scorer: Discriminator | toy.Oracle = discriminator
        if arm == "oracle":
            scorer = oracle(config, teacher, policy)
        if arm == "frozen":
            config = toy.settings(
                {**values, "run": {"seed": seed}, "algorithm": {**values["algorithm"], "freeze_discriminator": True}}
            )
        toy.run(config, "gad", student, scorer, groups, template, look)
    q = policy.probabilities()
    return {
        "experiment": "mixture",
        "geometry": teacher.name,
        "arm": arm,
        "seed": seed,
        "seconds": time.process_time() - start,
        **measures(q, teacher),
        "density": q.tolist(),
        "curve": curve,
    }


def oracle(config: Any, teacher: Teacher, policy: GaussianPolicy) -> toy.Oracle:
    log_p = teacher.probabilities.clamp_min(1e-12).log().tolist()

    def bin_of(response: Response) -> int:
        return response.token_ids[0] - FIRST

    def log_q(prompt: Prompt, response: Response) -> float:
        return policy.probabilities().log()[bin_of(response)].item()

    return toy.Oracle(config.discriminator, lambda prompt, response: log_p[bin_of(response)], log_q)
