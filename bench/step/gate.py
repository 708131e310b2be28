"""Checks what a side found in its first step: rewards, losses and gradients against fp64 on that side's own rollouts.

python -m bench.step.gate PROBLEM FINDINGS.. prints a list of relative L2 errors as JSON.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.step.literal import Literal, Row, advantages, load_discriminator, load_student
from bench.step.problem import Problem
from bench.step.worker import Channel, Clock, gradients_of


def errors(problem: Problem, found: dict[str, Any]) -> dict[str, float]:
    """rewards, losses, and the gradient of both models, each as one vector and the worst parameter of it.

    Losses are taken absolutely, in units of max(1, loss): the policy's is near zero by its definition."""
    student, discriminator = load_student(problem, torch.float64), load_discriminator(problem, torch.float64)
    passes = Literal(
        student,
        load_student(problem, torch.float64).requires_grad_(False),
        discriminator,
        problem.algorithm,
        Clock(),
        temperature=problem.temperature,
        rows_at_once=problem.samples,
        pad_id=discriminator.config.pad_token_id,
    )
    scored: list[Row] = [(g["d_prompt"], y) for g in found["groups"] for y in g["d_responses"][1:]]
    teachers: list[Row] = [(g["d_prompt"], g["d_responses"][0]) for g in found["groups"] for _ in g["samples"]]
    rewards = passes.rewards(scored).view(len(found["groups"]), -1)
    rows: list[Row] = [(g["prompt"], y) for g in found["groups"] for y in g["samples"]]
    policy = passes.policy_backward(rows, advantages(rewards, found["epsilon"]).flatten())
    loss = passes.discriminator_backward(list(zip(teachers, scored, strict=True)))
    losses = {"policy": policy, "discriminator": loss}
    out = {"rewards": _relative(torch.tensor(found["rewards"], dtype=torch.float64), rewards)}
    for name, exact in losses.items():
        out[f"{name} loss"] = abs(found["losses"][name] - exact) / max(1.0, abs(exact))
    for name, model in (("student", student), ("discriminator", discriminator)):
        out |= {f"{name} {key}": value for key, value in _gradient(found["gradients"][name], gradients_of(model))}
    return out


def _relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def _gradient(found: dict[str, Tensor], exact: dict[str, Tensor]) -> list[tuple[str, float]]:
    if found.keys() != exact.keys():
        raise RuntimeError(f"gradients of different parameters: {sorted(found.keys() ^ exact.keys())[:3]}")
    off = {name: float((found[name].double() - g).norm()) for name, g in exact.items()}
    whole = sum(x * x for x in off.values()) ** 0.5 / float(torch.cat([g.flatten() for g in exact.values()]).norm())
    worst = max(x / float(exact[name].norm()) for name, x in off.items())
    return [("gradient", whole), ("worst parameter", worst)]


def main() -> None:
    channel = Channel()
    parser = argparse.ArgumentParser()
    parser.add_argument("problem", type=Path)
    parser.add_argument("findings", type=Path, nargs="+")
    options = parser.parse_args()
    problem = Problem.read(options.problem)
    channel.tell([errors(problem, torch.load(path, weights_only=False)) for path in options.findings])


if __name__ == "__main__":
    main()
