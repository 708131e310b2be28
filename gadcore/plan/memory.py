"""Bytes of every state of a step on one rank: what is held, and what computing takes beside it.

Parameters, gradients and moments are cut over the ranks, or over those of a copy (distributed.replicate); adapters and
their base are whole on each. The sampler's weights are whole, or cut over `tensor_parallel` ranks. States are never
added up: they follow each other. Masters in host memory, and what is moved off an accelerator, count for the host.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import get_args

from gadcore.config.rollout import VLLMSettings
from gadcore.config.settings import Config
from gadcore.kernels.linear_logprob import KEEP_BYTES
from gadcore.memory.holdings import ALWAYS, Holding, State, needs
from gadcore.memory.placement import Offload, tier_name
from gadcore.models.activations import Mode
from gadcore.models.host_master import SLICES_BYTES
from gadcore.models.shared_base import shares_base
from gadcore.plan.activations import kept_bytes
from gadcore.plan.dimensions import Dimensions
from gadcore.plan.gathered import gathered_bytes, outside_bytes
from gadcore.plan.machine import Machine
from gadcore.plan.moments import Pass
from gadcore.plan.roles import ITEM, Precision, Role, reference_bytes, role_of
from gadcore.plan.workload import Workload
from gadcore.rollout.engine import Engine, engine_class
from gadcore.rollout.vllm_adapter import AT_ONCE_BYTES
from gadcore.train.progress import has_discriminator

STATES: tuple[State, ...] = get_args(State)


@dataclass(frozen=True)
class Case:
    """What is planned for."""

    config: Config
    student: Dimensions
    discriminator: Dimensions
    machine: Machine
    work: Workload

    @property
    def offload(self) -> Offload:
        """Where what waits lies. UserError where the machine has no such tier."""
        return tier_name(self.config.memory.offload, self.machine.kind)

    @property
    def shards(self) -> int:
        """Ranks that a model without adapters, or a copy of it, is cut over."""
        return max(1, self.machine.ranks // self.config.distributed.replicate)

    def shards_of(self, role: Role) -> int:
        """Ranks that what is trained of a model is cut over."""
        return 1 if role.adapted else self.shards

    def gathers(self, role: Role) -> bool:
        """Whether a pass of the model gathers its weights from other ranks."""
        return self.machine.ranks > 1 and not role.adapted

    @property
    def engine(self) -> type[Engine]:
        """The class of the sampler's engine."""
        return engine_class(self.config)

    @property
    def sampling_dtype(self) -> str:
        return self.engine.dtype(self.config)

    @property
    def sequences_at_once(self) -> int:
        """Sequences that a sampler works on at a time, at most."""
        rollout = self.config.rollout
        if not isinstance(rollout, VLLMSettings):
            return self.work.samples
        machine = self.machine
        return rollout.sequences_at_once(machine.kind, machine.figures["memory_bytes"], machine.name)

    @property
    def graphs(self) -> bool:
        """Whether the sampler replays CUDA graphs."""
        rollout = self.config.rollout
        return isinstance(rollout, VLLMSettings) and self.machine.kind == "cuda" and not rollout.eager("cuda")

    @property
    def context_tokens(self) -> int:
        """Tokens of the longest sequence that a sampler must be able to hold."""
        return self.config.rollout.context_tokens or self.work.longest_prompt + self.work.limit

    @property
    def sampler_bytes(self) -> float:
        """What a sampler takes beside weights and KV cache while it is awake."""
        figures = self.machine.figures
        return figures["engine_bytes"] + (figures["engine_graph_bytes"] if self.graphs else 0.0)

    @property
    def student_precision(self) -> Precision:
        return Precision.of(self.config.student)

    @property
    def discriminator_precision(self) -> Precision:
        return Precision.of(self.config.discriminator)

    @cached_property
    def policy(self) -> Role:
        """What is trained of the student."""
        return role_of(self.student, self.config.student, "student", self.student.parameters)

    @cached_property
    def scorer(self) -> Role:
        """What is trained of the discriminator; nothing of none."""
        d = self.discriminator
        if not self.has_discriminator:
            return Role(0, 4)
        return role_of(d, self.config.discriminator, "discriminator", d.scalar_parameters)

    @property
    def base_bytes(self) -> int:
        """Of what lies frozen under adapters, once where both models share it."""
        student, discriminator = self.config.student, self.config.discriminator
        same = self.student.source == self.discriminator.source
        if self.policy.adapted and self.scorer.adapted and shares_base(student, discriminator, same_model=same):
            return self.policy.frozen
        return self.policy.frozen + self.scorer.frozen

    @property
    def has_discriminator(self) -> bool:
        """Whether the run trains one: all but the baselines do."""
        return has_discriminator(self.work.steps)

    @property
    def has_reference(self) -> bool:
        """Whether the run has a reference policy: where a GAD stage has a KL term."""
        return self.config.algorithm.kl_coef > 0 and self.work.steps.get("gad", 0) > 0

    @property
    def states(self) -> list[State]:
        """Of the run's steps."""
        there = {"discriminator": self.has_discriminator, "reference": self.has_reference}
        return [state for state in STATES if there.get(state.removesuffix("_update"), True)]

    @property
    def shared(self) -> bool:
        """Whether trainer and sampler have one copy of the student's weights."""
        return self.engine.shares_weights(self.config, self.machine.kind, self.machine.ranks)


@dataclass(frozen=True)
class Choice:
    """What a plan may choose. kv_bytes: of the KV cache, on one rank. tensor_parallel: ranks that share a sampler."""

    mode: Mode
    micro_batch_tokens: int
    kv_bytes: float
    tensor_parallel: int = 1


@dataclass(frozen=True)
class StateMemory:
    """Bytes of one state on one rank. held: by holding; working: by what it is for."""

    held: dict[Holding, float]
    working: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(self.held.values()) + sum(self.working.values())


def holdings(case: Case, choice: Choice) -> dict[Holding, float]:
    """Bytes of every holding of a run on one rank, wherever it lies at the time."""
    student, discriminator = case.student_precision, case.discriminator_precision
    policy, scorer = (role.trained / case.shards_of(role) for role in (case.policy, case.scorer))
    reference = reference_bytes(case.student, student) / case.shards
    if case.policy.adapted:
        reference = policy * case.policy.item
    engine = case.student.parameters * ITEM[case.sampling_dtype] / choice.tensor_parallel
    return {
        "base.parameters": float(case.base_bytes),
        "student.parameters": policy * case.policy.item,
        "student.gradients": policy * student.gradients,
        "student.optimizer": 0.0 if student.host else 2 * policy * case.policy.item,
        "reference.parameters": reference if case.has_reference else 0.0,
        "discriminator.parameters": scorer * case.scorer.item,
        "discriminator.gradients": scorer * discriminator.gradients,
        "discriminator.optimizer": 0.0 if discriminator.host else 2 * scorer * case.scorer.item,
        "engine.weights": engine if case.engine.holds_memory and not case.shared else 0.0,
        "engine.kv_cache": choice.kv_bytes if case.engine.holds_memory else 0.0,
    }


def master_bytes(case: Case) -> float:
    """Bytes of float32 masters and their moments in the memory of the host, of one rank."""
    policy, scorer = case.student.parameters, case.discriminator.scalar_parameters if case.has_discriminator else 0
    kept = policy * case.student_precision.host + scorer * case.discriminator_precision.host
    return 12.0 * kept / case.shards


def held(case: Case, choice: Choice, state: State) -> dict[Holding, float]:
    """Bytes of what lies on the accelerator in a state, by holding.

    Without offload everything stays, but for gradients, and for what belongs to the sampler, which sleeps.
    """
    needed = needs(state, shared=case.shared)
    found = {}
    for name, size in holdings(case, choice).items():
        stays = case.offload == "none" and not name.endswith(".gradients") and not name.startswith("engine.")
        if name == "engine.kv_cache" and case.machine.kind == "cpu":
            # Given back after every use, so that only blocks that were written take memory.
            size = min(size, needed_kv(case, choice.tensor_parallel))
        if size and (name in needed or stays):
            found[name] = size
    return found


def host_bytes(case: Case, choice: Choice) -> float:
    """Bytes of page-locked host memory of a node: copies of all that is moved off an accelerator, and masters."""
    if case.machine.kind != "cuda":
        return 0.0
    # A sleeping vLLM keeps nothing: the trainer's weights are newer.
    moved = [
        size
        for name, size in holdings(case, choice).items()
        if case.offload == "pinned"
        and not name.startswith("engine.")
        and not name.endswith(".gradients")
        and not (case.shared and name in ALWAYS)
    ]
    return (sum(moved) + master_bytes(case)) * case.machine.per_node


def state_memory(case: Case, choice: Choice, state: State) -> StateMemory:
    """Everything that a state takes on one rank, at its peak."""
    lies, on_cpu = held(case, choice, state), case.machine.kind == "cpu"
    working = {"process": case.machine.figures["process_bytes"]}
    if on_cpu and (masters := master_bytes(case)):
        # There the host's memory is the device's.
        working["masters and moments"] = masters
    if state == "rollout" and case.engine.holds_memory:
        working["sampler's buffers"] = case.sampler_bytes
    elif state == "synchronise" and not case.shared:
        if made := case.policy.made:
            # Some matrices at a time, until they are enough to be brought together.
            working["matrices made whole"] = AT_ONCE_BYTES + made * case.student_precision.weights
        gathers = case.gathers(case.policy)
        if gathers or case.student_precision.weights != ITEM[case.sampling_dtype] or not made:
            # One tensor at a time: gathered, and cast.
            largest = max(case.student.head, case.student.matrices / 3)
            whole = case.student_precision.weights if gathers else 0
            working["a tensor on its way"] = largest * (ITEM[case.sampling_dtype] + whole)
    elif state == "reference":
        working |= _reference(case, choice) | _made(case.policy, case.student_precision)
    elif state in ("student", "discriminator"):
        gradients = lies.get(f"{state}.gradients", 0.0)
        of = (
            (case.policy, case.student_precision) if state == "student" else (case.scorer, case.discriminator_precision)
        )
        working |= _training(case, choice, state, gradients) | _made(*of)
    elif state in ("student_update", "discriminator_update") and not on_cpu:
        is_student = state == "student_update"
        if (case.student_precision if is_student else case.discriminator_precision).host:
            d = case.student if is_student else case.discriminator
            working["slices of the masters"] = min(SLICES_BYTES, 12.0 * d.parameters / case.shards)
    return StateMemory(lies, working)


def _made(role: Role, precision: Precision) -> dict[str, float]:
    """A matrix of few bits as a product reads it: one at a time."""
    return {"a matrix made whole": float(role.made * precision.products)} if role.made else {}


def _reference(case: Case, choice: Choice) -> dict[str, float]:
    """One forward pass that keeps nothing: the widest tensors of a layer, the head's, casts of wider weights."""
    d, precision, work = case.student, case.student_precision, case.work
    tokens = min(part_tokens(case, choice.micro_batch_tokens, True), work.student_tokens / case.machine.ranks)
    passing = tokens * ((3 * d.mlp + 2 * d.hidden) * precision.products + 2 * d.hidden * precision.weights)
    responses = work.responses_among(tokens)
    head = responses * d.hidden * precision.products
    if case.machine.kind == "cuda":
        head += min(responses * d.vocabulary * 4, case.machine.figures["logits_bytes"])
    working = {"a pass without gradients": passing + head}
    if precision.autocast and d.tied:
        # The embedding stays wide for the look-up, and is the head's matrix as well.
        working["casts of the weights"] = 2.0 * d.head
    if case.gathers(case.policy):
        # Of two layers, and nobody's gradient.
        outside = outside_bytes(d, d.root, precision.weights, narrow_head=precision.autocast)
        working["gathered layers"] = outside + 2.0 * precision.products * d.layer
    return working


def _training(case: Case, choice: Choice, state: State, gradients: float) -> dict[str, float]:
    ranks, work = case.machine.ranks, case.work
    is_student, on_cpu = state == "student", case.machine.kind == "cpu"
    d, precision = case.student, case.student_precision
    if not is_student:
        d, precision = case.discriminator, case.discriminator_precision
    autocast, item, compute = precision.autocast, precision.weights, precision.products
    rank_tokens = (work.student_tokens if is_student else work.discriminator_tokens) / ranks
    tokens = min(part_tokens(case, choice.micro_batch_tokens, is_student), rank_tokens)
    single = rank_tokens <= choice.micro_batch_tokens
    role = case.policy if is_student else case.scorer
    frozen, gathers = role.adapted, case.gathers(role)

    if not gathers and not on_cpu:
        responses = work.responses_among(tokens) if is_student else 0.0
        sizes = (item, precision.gradients, compute)
        logits_bytes = case.machine.figures["logits_bytes"]
        moment = Pass(d, choice.mode, tokens, responses, single, *sizes, autocast, logits_bytes, frozen)
        return moment.fullest(gradients)
    kept = kept_bytes(d, choice.mode, tokens, autocast=autocast, item=item, again=on_cpu)
    head = 0.0
    if is_student:
        responses = work.responses_among(tokens)
        logits = responses * d.vocabulary * 4
        # Its states and their gradient, the gradient of the matrix, which several chunks of logits sum in float32 under
        # autocast, and on CUDA logits of a chunk; the CPU's GRPO loss holds blocks in the cache.
        chunk = case.machine.figures.get("logits_bytes", math.inf)
        matrix = 0 if frozen else d.head * (4 if autocast and logits > chunk else compute)
        head = 2 * responses * d.hidden * compute + matrix
        # Log-probs without a loss in the same pass: a CPU holds logits for their backward pass.
        held_logits = KEEP_BYTES if case.config.algorithm.loss is not None or "soda" in work.steps else 0
        head += min(logits, held_logits if on_cpu else chunk)
    # Gradients of the widest tensors of a layer, while its backward pass is at work.
    passing = tokens * (3 * d.mlp + 2 * d.hidden) * compute
    # A gradient of [vocabulary, hidden] is made whole before it is added to what is there: of the embedding, but not on
    # a CPU, and of an output head, from the second micro-batch on. One that is summed in a wider dtype is cast first.
    whole = is_student and not single if on_cpu else is_student and d.tied or not single
    whole = whole and not frozen
    embedding = d.head * (item + (precision.gradients if precision.gradients > item else 0)) if whole else 0.0
    working = {"gradients on their way": passing + (0.0 if gathers else embedding)}
    # Gradients appear while activations go, but malloc keeps what those leave, and shards are small.
    working["activations and head"] = kept + head
    if gathers:
        root = d.root if is_student else d.scalar_parameters - d.layers * d.layer
        if autocast and is_student and d.tied:
            working["casts of the weights"] = 2.0 * d.head
        working["gathered layers"] = gathered_bytes(
            d.layer,
            root,
            compute,
            sum(working.values()),
            outside=outside_bytes(d, root, precision.weights, narrow_head=is_student and autocast),
            gradients=precision.gradients,
        )
    elif autocast:
        working["casts of the weights"] = _casts(d, choice.mode, d.head if is_student else 0)
    return working


def _casts(d: Dimensions, mode: Mode, head: int) -> float:
    """bfloat16 copies of wider weights. Nothing keeps them but the backward pass, which reads those of every product;
    where a layer is computed again, they are made again.
    """
    return 2.0 * (d.layers * d.matrices + head if mode == "off" else max(d.matrices, head))


def part_tokens(case: Case, budget: int, is_student: bool) -> int:
    """Packed tokens of the largest micro-batch: a response of full length stays whole, whatever the budget."""
    longest = case.work.longest_prompt + case.work.limit * (1 if is_student else 2)
    return max(budget, longest)


def peak(case: Case, choice: Choice) -> dict[State, StateMemory]:
    """Memory of every state on one rank."""
    return {state: state_memory(case, choice, state) for state in case.states}


def room(case: Case, states: Mapping[State, StateMemory]) -> float:
    """Bytes that are left in the fullest state; below 0 where it does not fit."""
    return case.machine.usable_bytes - max(memory.total for memory in states.values())


def needed_kv(case: Case, tensor_parallel: int) -> float:
    """Bytes of KV cache, on a rank, for all sequences of a sampler at full length; shared prompts once."""
    work = case.work
    samplers = case.machine.ranks / tensor_parallel
    sequences = min(work.prompts * work.samples / samplers, case.sequences_at_once)
    tokens = sequences * (work.longest_prompt / work.samples + work.limit)
    tokens = max(tokens, case.context_tokens)
    return tokens * case.student.kv_bytes(ITEM[case.sampling_dtype]) / tensor_parallel


def least_kv(case: Case, tensor_parallel: int) -> float:
    """Bytes of KV cache below which not even one group can be sampled at full length."""
    work = case.work
    tokens = work.longest_prompt + work.samples * work.limit
    return tokens * case.student.kv_bytes(ITEM[case.sampling_dtype]) / tensor_parallel
