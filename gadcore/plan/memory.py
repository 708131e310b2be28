"""Bytes of every state of a step on one rank: what is held, and what computing takes beside it.

Parameters, gradients and moments are cut over the ranks; the sampler's weights are whole, or cut over `tensor_parallel`
ranks. States are never added up: they follow each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import get_args

from gadcore.config.rollout import VLLMRollout
from gadcore.config.settings import Config
from gadcore.memory.holdings import Holding, State, needs
from gadcore.memory.placement import Offload, tier_name
from gadcore.models.activations import Mode
from gadcore.plan.activations import kept_bytes
from gadcore.plan.dimensions import Dimensions
from gadcore.plan.machine import Machine
from gadcore.plan.workload import Workload
from gadcore.rollout.engine import Engine, engine_class

STATES: tuple[State, ...] = get_args(State)
ITEM = {"float32": 4, "bfloat16": 2}
# Logits that the head's kernels hold at a time on CUDA (kernels/triton/linear_grpo_loss.py); the CPU's hold blocks in
# the cache.
_LOGITS_BYTES = 2 << 30


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
        if not isinstance(rollout, VLLMRollout):
            return self.work.samples
        machine = self.machine
        return rollout.sequences_at_once(machine.kind, machine.figures["memory_bytes"], machine.name)

    @property
    def shared(self) -> bool:
        """Whether trainer and sampler have one copy of the student's weights."""
        return self.engine.shares_weights(self.config, self.machine.kind)


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
    config, ranks = case.config, case.machine.ranks
    student = case.student.parameters * ITEM[config.student.dtype] / ranks
    discriminator = case.discriminator.scalar_parameters * ITEM[config.discriminator.dtype] / ranks
    engine = case.student.parameters * ITEM[case.sampling_dtype] / choice.tensor_parallel
    return {
        "student.parameters": student,
        "student.gradients": student,
        "student.optimizer": 2 * student,
        "reference.parameters": student if config.algorithm.kl_coef > 0 else 0.0,
        "discriminator.parameters": discriminator,
        "discriminator.gradients": discriminator,
        "discriminator.optimizer": 2 * discriminator,
        "engine.weights": engine if case.engine.holds_memory and not case.shared else 0.0,
        "engine.kv_cache": choice.kv_bytes if case.engine.holds_memory else 0.0,
    }


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
    """Bytes of page-locked host memory of a node: copies of all that is moved off an accelerator."""
    if case.machine.kind != "cuda":
        return 0.0
    # A sleeping vLLM keeps nothing: the trainer's weights are newer.
    moved = [
        size
        for name, size in holdings(case, choice).items()
        if case.offload == "pinned" and not name.startswith("engine.") and not name.endswith(".gradients")
    ]
    return sum(moved) * case.machine.per_node


def state_memory(case: Case, choice: Choice, state: State) -> StateMemory:
    """Everything that a state takes on one rank, at its peak."""
    lies = held(case, choice, state)
    working = {"process": case.machine.figures["process_bytes"]}
    if state == "rollout" and case.engine.holds_memory:
        working["sampler's buffers"] = case.machine.figures["engine_bytes"]
    elif state == "synchronise" and not case.shared:
        # One tensor at a time: gathered, and cast.
        largest = max(case.student.head, case.student.matrices / 3)
        working["a tensor on its way"] = largest * (
            ITEM[case.sampling_dtype] + (ITEM[case.config.student.dtype] if case.machine.ranks > 1 else 0)
        )
    elif state in ("student", "discriminator"):
        gradients = lies.get(f"{state}.gradients", 0.0)  # type: ignore[call-overload]
        working |= _training(case, choice, state, gradients)
    return StateMemory(lies, working)


def _training(case: Case, choice: Choice, state: State, gradients: float) -> dict[str, float]:
    config, ranks, work = case.config, case.machine.ranks, case.work
    is_student = state == "student"
    d = case.student if is_student else case.discriminator
    settings = config.student if is_student else config.discriminator
    autocast, item = settings.autocast != "none", ITEM[settings.dtype]
    compute = 2 if autocast else item
    rank_tokens = (work.student_tokens if is_student else work.discriminator_tokens) / ranks
    tokens = min(part_tokens(case, choice.micro_batch_tokens, is_student), rank_tokens)
    single = rank_tokens <= choice.micro_batch_tokens

    on_cpu = case.machine.kind == "cpu"
    kept = kept_bytes(d, choice.mode, tokens, autocast=autocast, item=item, again=on_cpu)
    head = 0.0
    if is_student:
        responses = tokens * work.samples * work.response / (work.prompt + work.samples * work.response)
        logits = responses * d.vocabulary * 4
        # Its states and their gradient, the gradient of the matrix, and scratch for logits on CUDA.
        head = 2 * responses * d.hidden * compute + d.head * (4 if autocast and logits > _LOGITS_BYTES else compute)
        head += min(logits, _LOGITS_BYTES) if case.machine.kind == "cuda" else 0.0
    # Gradients of the widest tensors of a layer, while its backward pass is at work.
    passing = tokens * (3 * d.mlp + 2 * d.hidden) * compute
    # A gradient of [vocabulary, hidden] is made whole before it is added to what is there: of the embedding, but not on
    # a CPU, and of an output head, from the second micro-batch on.
    whole = is_student and not single if on_cpu else is_student and d.tied or not single
    embedding = d.head * item if whole else 0.0
    working = {"gradients on their way": passing + (embedding if ranks == 1 else 0.0)}
    # With one micro-batch gradients appear while activations go: on CUDA the larger of the two is the peak, while
    # malloc keeps what activations leave.
    overlap = gradients if single and ranks == 1 and case.machine.kind == "cuda" else 0.0
    working["activations and head"] = max(kept + head - overlap, 0.0)
    if ranks > 1:
        root = d.root if is_student else d.scalar_parameters - d.layers * d.layer
        working["gathered layers"] = gathered_bytes(d.layer, root, compute, sum(working.values()))
    elif autocast:
        matrices = d.layers * d.matrices + (d.head if is_student else 0)
        working["casts of the weights"] = 2.0 * matrices
    return working


def part_tokens(case: Case, budget: int, is_student: bool) -> int:
    """Packed tokens of the largest micro-batch: a response of full length stays whole, whatever the budget."""
    longest = case.work.longest_prompt + case.work.limit * (1 if is_student else 2)
    return max(budget, longest)


def gathered_bytes(layer: int, root: int, compute: int, beside: float) -> float:
    """Whole weights of FSDP2 beside the shards: of the root throughout, of two layers, and a layer's whole gradient.

    Gradients are reduced in float32. At the end of the backward pass, when what was kept (`beside`) is gone, the root
    has its weights, its gradient and the copy that is reduced.
    """
    during = compute * (root + 3 * layer) + (4 * layer if compute < 4 else 0)
    return max(during, root * (2 * compute + 4) - beside)


def peak(case: Case, choice: Choice) -> dict[State, StateMemory]:
    """Memory of every state on one rank."""
    return {state: state_memory(case, choice, state) for state in STATES}


def room(case: Case, states: Mapping[State, StateMemory]) -> float:
    """Bytes that are left in the fullest state; below 0 where it does not fit."""
    return case.machine.usable_bytes - max(memory.total for memory in states.values())


def needed_kv(case: Case, tensor_parallel: int) -> float:
    """Bytes of KV cache, on a rank, for all sequences of a sampler at full length; shared prompts once."""
    work = case.work
    samplers = case.machine.ranks / tensor_parallel
    sequences = min(work.prompts * work.samples / samplers, case.sequences_at_once)
    tokens = sequences * (work.longest_prompt / work.samples + work.limit)
    tokens = max(tokens, work.longest_prompt + work.limit)
    return tokens * case.student.kv_bytes(ITEM[case.sampling_dtype]) / tensor_parallel


def least_kv(case: Case, tensor_parallel: int) -> float:
    """Bytes of KV cache below which not even one group can be sampled at full length."""
    work = case.work
    tokens = work.longest_prompt + work.samples * work.limit
    return tokens * case.student.kv_bytes(ITEM[case.sampling_dtype]) / tensor_parallel
