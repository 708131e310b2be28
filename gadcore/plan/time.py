"""Seconds of every phase of a step, from a roofline: rates of products and of memory, and the work that is to be done.

layers      2 FLOPs a matrix entry and token forward, twice that backward, once more for what is computed again;
            over the product rate, and over what norms, activations and casts leave of the time; on a GPU, a micro-batch
            casts all weights and sums all gradients, however few its tokens are
attention   4 FLOPs a (query, key) pair and entry of a head forward, 2.5 times that backward
head        three products in a pass of the policy or of cross-entropy, one in the reference's, four at most in soda's
decoding    a step of a sampler takes the longest of: reading weights and keys, its products, its launches
optimizer   some passes over parameters; masters in host memory come and leave with their moments meanwhile, both ways
            at a time; gradients of adapters on several ranks are added up before it
moves       what a state needs and the one before it did not, and back where it was changed
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from gadcore.memory.holdings import CHANGES, FOLLOWS, needs
from gadcore.plan.dimensions import Dimensions
from gadcore.plan.memory import ITEM, Case, Choice, Precision, holdings
from gadcore.plan.roles import Role
from gadcore.plan.workload import Workload, pairs_of


@dataclass(frozen=True)
class Pass:
    """One pass of a model over packed tokens. head: FLOPs factor of the output head, on `responses` tokens."""

    tokens: float
    pairs: float
    responses: float
    head: float
    backward: bool


@dataclass(frozen=True)
class RunTime:
    """Seconds. steps: of every stage, {phase: seconds}; stages: number of steps; once: what comes on top."""

    steps: dict[str, dict[str, float]]
    stages: dict[str, int]
    once: dict[str, float]

    @property
    def phases(self) -> dict[str, float]:
        """Of the whole run, by phase."""
        total: dict[str, float] = {}
        for stage, phases in self.steps.items():
            for phase, seconds in phases.items():
                total[phase] = total.get(phase, 0.0) + seconds * self.stages[stage]
        return total | self.once

    @property
    def total(self) -> float:
        return sum(self.phases.values())


def pass_seconds(case: Case, choice: Choice, d: Dimensions, settings_name: str, work: Pass) -> float:
    """One forward pass on every rank, with its backward pass where there is one; tokens are of all ranks."""
    machine, figures = case.machine, case.machine.figures
    precision = case.student_precision if settings_name == "student" else case.discriminator_precision
    dtype = "float32" if precision.products == 4 else "bfloat16"
    rate = machine.product_flops(dtype)
    # Forward passes that backward makes again: "selective" leaves products and attention out.
    again = {"off": 0.0, "selective": figures["elementwise_share"], "full": 1.0}[choice.mode]
    times, attention_times = (3 + again, 3.5 + (choice.mode == "full")) if work.backward else (1.0, 1.0)
    role = case.policy if settings_name == "student" else case.scorer
    if role.adapted and work.backward:
        # No gradient of a frozen weight; three products with A and B.
        times += 3 * role.trained / (d.layers * d.matrices) - 1
    layers = times * d.token_flops * work.tokens / (rate * figures["product_share"])
    layers /= 1 - figures["elementwise_share"]
    attention = attention_times * d.pair_flops * work.pairs / (rate * figures["attention_share"])
    of_head = work.head - (role.adapted and work.backward and work.head > 0)
    head = of_head * d.head_flops * work.responses / (rate * figures["head_share"])
    computing = (layers + attention + head) / machine.ranks
    parameters = role.trained
    micro_batches = max(1, math.ceil(work.tokens / machine.ranks / choice.micro_batch_tokens))
    if role.few and machine.kind == "cuda":
        # Read as bits and written as a matrix, for every product with it.
        passes = 2 + (choice.mode == "full") if work.backward else 1
        moved = passes * micro_batches * role.few * (1 + precision.products)
        computing += moved / (figures["memory_bandwidth"] * figures["memory_share"])
    if not case.gathers(role):
        return computing + micro_batches * _weights_seconds(case, choice, parameters, precision, work.backward)
    # Layers are gathered for each pass, in the dtype of the products, what is outside of them once and as it is;
    # gradients are reduced in float32.
    inside = d.layers * d.layer
    moved = inside * (2 * ITEM[dtype] + 4 if work.backward else ITEM[dtype])
    moved += (parameters - inside) * (precision.weights + 4 * work.backward)
    moved *= micro_batches
    hidden = figures["overlap_share"] * computing
    talking = moved / collective_bandwidth(case)
    if work.backward:
        talking += micro_batches * _copies_seconds(case, parameters)
    return computing + max(0.0, talking - hidden)


def _weights_seconds(case: Case, choice: Choice, parameters: int, precision: Precision, backward: bool) -> float:
    """What a micro-batch costs on CUDA however few its tokens are: casts of all weights, sums of all gradients."""
    figures = case.machine.figures
    if case.machine.kind == "cpu":
        return 0.0
    # Read and written; the backward pass makes the casts again where it makes layers again.
    casts = (precision.weights + precision.products) * (1 + (backward and choice.mode != "off"))
    moved = casts if precision.autocast else 0
    if backward:
        # Made, cast where it is summed in a wider dtype, and added to what is there.
        made, summed = precision.products, precision.gradients
        moved += made + (made + summed if made < summed else 0) + 3 * summed
    return moved * parameters / (figures["memory_bandwidth"] * figures["memory_share"])


def collective_bandwidth(case: Case) -> float:
    """Bytes/s at which every rank gathers, or reduces, what is cut over the ranks of a copy."""
    figures, machine, shards = case.machine.figures, case.machine, case.shards
    link = figures["node_link"]
    if shards > machine.per_node:
        # A ring over nodes enters and leaves each one by all of its network links.
        link = min(link, figures["network_link"] * machine.per_node)
    return link * figures["collective_share"] * shards / (shards - 1) if shards > 1 else math.inf


def _copies_seconds(case: Case, parameters: int) -> float:
    """Gradients of every shard, added up over the copies in float32 (HSDP)."""
    figures, copies = case.machine.figures, case.config.distributed.replicate
    if copies == 1:
        return 0.0
    link = figures["network_link" if case.machine.nodes > 1 else "node_link"] * figures["collective_share"]
    return 2 * (copies - 1) / copies * 4 * parameters / case.shards / link


def optimizer_seconds(case: Case, role: Role, precision: Precision) -> float:
    """Clipping and AdamW on every rank's shard, or on the whole sum of all ranks' gradients."""
    figures, shards = case.machine.figures, case.shards_of(role)
    moved = figures["optimizer_passes"] * role.trained * precision.gradients / shards
    seconds = moved / (figures["memory_bandwidth"] * figures["memory_share"])
    if role.adapted:
        seconds += _sums_seconds(case, role.trained)
    if not precision.host or case.machine.kind == "cpu":
        return seconds
    both_ways = 2 * 12.0 * role.trained / shards
    return max(seconds, both_ways / (2 * figures["host_link"] * figures["duplex_share"]))


def _sums_seconds(case: Case, parameters: int) -> float:
    """Gradients that every rank has whole, added up over all of them in float32 (gadcore.distributed.gradients)."""
    figures, machine, ranks = case.machine.figures, case.machine, case.machine.ranks
    link = figures["node_link"]
    if machine.nodes > 1:
        link = min(link, figures["network_link"])
    return 2 * (ranks - 1) / ranks * 4 * parameters / (link * figures["collective_share"])


def decode_step_seconds(case: Case, choice: Choice, rows: float, context: float) -> float:
    """One decoding step of one sampler: `rows` sequences, each with `context` tokens behind it."""
    d, machine, figures = case.student, case.machine, case.machine.figures
    cut = choice.tensor_parallel
    item = ITEM[case.sampling_dtype]
    bandwidth = figures.get("decode_bandwidth") or figures["memory_bandwidth"] * figures["memory_share"]
    entries = d.layers * d.matrices + d.head
    reading = entries * item / cut / bandwidth
    keys = rows * context * d.kv_bytes(item) / cut / bandwidth
    products = 2 * entries * rows / cut / machine.decode_flops(rows, case.sampling_dtype)
    launches = figures["engine_layer_seconds"] * d.layers
    if case.graphs and rows <= figures["engine_graph_rows"]:
        launches = 0.0
    beside = figures["engine_step_seconds"] + figures.get("engine_row_seconds", 0.0) * rows
    if machine.kind == "cpu":
        # Nothing runs beside anything else.
        return max(reading, products) + keys + launches + beside
    return max(reading + keys, products, launches) + beside


def rollout_seconds(case: Case, choice: Choice, prompts: float, samples: int) -> float:
    """Sampling of a batch. Lengths are taken as exponential, cut at the limit, with the mean that is asked for."""
    work, samplers = case.work, case.machine.ranks / choice.tensor_parallel
    d = case.student
    sequences = prompts * samples / samplers
    if sequences == 0:
        return 0.0
    machine, figures = case.machine, case.machine.figures
    rate = machine.product_flops(case.sampling_dtype) * figures["product_share"] * (1 - figures["elementwise_share"])
    prefill = prompts / samplers * work.prompt * (d.token_flops + d.pair_flops * work.prompt / 2)
    seconds = prefill / choice.tensor_parallel / rate

    slots = min(sequences, case.sequences_at_once)
    if case.engine.batches_prompts:
        per_sequence = work.prompt / samples + work.response
        total_kv = choice.kv_bytes * choice.tensor_parallel
        slots = max(1.0, min(slots, total_kv / (per_sequence * d.kv_bytes(ITEM[case.sampling_dtype]))))
    else:
        slots = min(slots, samples)  # One prompt at a time.
    # Until the last sequences have begun, all slots are taken.
    full = (sequences - slots) * work.response / slots
    seconds += full * decode_step_seconds(case, choice, slots, work.prompt + work.response / 2)
    decay = _decay(work.response, work.limit)
    stride = max(1, work.limit // 128)
    for step in range(0, work.limit, stride):
        rows = slots * math.exp(-step / decay)
        if rows < 0.5:
            break
        width = min(stride, work.limit - step)
        seconds += width * decode_step_seconds(case, choice, max(rows, 1.0), work.prompt + step)
    return seconds


def _decay(mean: float, limit: int) -> float:
    """Mean of the exponential distribution that has the mean `mean` when cut at `limit`."""
    if mean >= 0.99 * limit:
        return 100.0 * limit
    low, high = mean, 100.0 * limit
    for _ in range(60):
        middle = (low + high) / 2
        if middle * (1 - math.exp(-limit / middle)) < mean:
            low = middle
        else:
            high = middle
    return low


def synchronise_seconds(case: Case, choice: Choice) -> float:
    """The student's weights reach the sampler: copied, what a rank's part of it lacks from others, and compared by a
    fingerprint. From shards it is a bound: gadcore.plan.resharding counts what is really exchanged."""
    if case.shared:
        return 0.0
    figures, parameters = case.machine.figures, case.student.parameters
    bandwidth = figures["memory_bandwidth"] * figures["memory_share"]
    item = ITEM[case.sampling_dtype]
    if not case.gathers(case.policy):
        return parameters * (case.student_precision.weights + 3 * item) / bandwidth
    engine, shard = (
        parameters * item / choice.tensor_parallel,
        parameters * case.student_precision.weights / case.shards,
    )
    # Packed, unpacked and stored; the fingerprint reads both sides twice.
    seconds = (4 * engine + 2 * engine + 3 * shard) / bandwidth
    near, far = min(case.shards, case.machine.per_node) - 1, max(0, case.shards - case.machine.per_node)
    links = (near / figures["node_link"], far / figures["network_link"] if far else 0.0)
    return seconds + engine / case.shards * max(links) / figures["collective_share"]


def offload_seconds(case: Case, choice: Choice) -> float:
    """Copies between accelerator and host, or files, over one GAD step; what never changes is only ever read back."""
    sizes, seconds = holdings(case, choice), 0.0
    states = [state for state in FOLLOWS if state in case.states]
    changed = frozenset[str]().union(*CHANGES.values())
    figures = case.machine.figures
    if case.offload == "file":
        out, back = (figures[name] / case.machine.per_node for name in ("file_write", "file_read"))
    else:
        out = back = figures.get("host_link", math.inf)
    for before, state in zip((states[-1], *states[:-1]), states, strict=True):
        old, new = needs(before, shared=case.shared), needs(state, shared=case.shared)
        for name, size in sizes.items():
            if name.endswith(".gradients") or name.startswith("engine.") or case.offload == "none":
                continue
            if name in new - old:
                seconds += size / back
            elif name in old - new and name in changed:
                seconds += size / out
    return seconds


def run_time(case: Case, choice: Choice) -> RunTime:
    """Seconds per phase of a step of each stage, and of the full run. Starting up is left out."""
    work, config, discriminator = case.work, case.config, case.discriminator
    algorithm = config.algorithm
    responses, teacher = work.sampled, work.prompts * work.teacher
    update = optimizer_seconds(case, case.scorer, case.discriminator_precision)
    scored = Pass(work.discriminator_tokens, work.discriminator_pairs, 0, 0, True)
    d_seconds = pass_seconds(case, choice, discriminator, "discriminator", scored) + update
    looked = pass_seconds(case, choice, discriminator, "discriminator", replace(scored, backward=False))
    updates = algorithm.discriminator_steps / algorithm.discriminator_every
    d_seconds = updates * d_seconds + (1 - 1 / algorithm.discriminator_every) * looked
    g_update = optimizer_seconds(case, case.policy, case.student_precision)
    policy = Pass(work.student_tokens, work.student_pairs, responses, 3, True)
    g_seconds = pass_seconds(case, choice, case.student, "student", policy) + g_update
    if algorithm.kl_coef > 0:
        reference = Pass(work.student_tokens, work.student_pairs, responses, 1, False)
        g_seconds += pass_seconds(case, choice, case.student, "student", reference)
    entropy = Pass(work.warmup_tokens, work.warmup_pairs, teacher, 3, True)
    ce_seconds = pass_seconds(case, choice, case.student, "student", entropy) + g_update

    sampling = {
        "synchronise": synchronise_seconds(case, choice),
        "rollout": rollout_seconds(case, choice, work.prompts, work.samples),
        "offload": offload_seconds(case, choice),
    }
    warmup = {**sampling, "discriminator": d_seconds} if algorithm.discriminator_warmup else {}
    if algorithm.student_warmup:
        warmup = {**warmup, "student": ce_seconds}
    gad = {**sampling, "discriminator": looked if algorithm.freeze_discriminator else d_seconds, "student": g_seconds}
    ce = {"student": ce_seconds}
    stages = {"sft": ce, "seqkd": ce, "warmup": warmup, "gad": gad}
    once = _once(case, choice, looked)
    if "soda" in work.steps:
        pairs = _pairs_pass(work, algorithm.soda_samples)
        stages["soda"] = {"student": pass_seconds(case, choice, case.student, "student", pairs) + g_update}
        if rows := work.prompts * work.steps["soda"] / max(1, config.schedule.soda_epochs):
            known = pass_seconds(case, choice, case.student, "student", replace(pairs, head=1, backward=False))
            once["rollout"] = rollout_seconds(case, choice, rows, algorithm.soda_samples)
            once["reference"] = known * rows / work.prompts
    return RunTime({stage: stages[stage] for stage in work.steps}, work.steps, once)


def _pairs_pass(work: Workload, samples: int) -> Pass:
    """The pass of a step of `soda`: prompt, teacher's response and samples; its head computes the logits twice, but for
    those that a CPU holds."""
    lengths = [work.teacher, *[work.response] * samples]
    tokens = work.prompts * (work.prompt + sum(lengths))
    pairs = work.prompts * pairs_of(work.prompt, lengths)
    return Pass(tokens, pairs, work.prompts * sum(lengths), 4, True)


def _once(case: Case, choice: Choice, looked: float) -> dict[str, float]:
    """Held-out evaluations before, between and after the stages, and checkpoints."""
    work, every, steps = case.work, case.config.checkpoint.every, sum(case.work.steps.values())
    samples = case.config.data.eval_samples
    # As Trainer.evaluate() has it: what has not moved is not drawn again, and a fresh head is asked for nothing.
    still = "warmup" in work.steps and not case.config.algorithm.student_warmup
    blank = 1 + ("sft" in work.steps) if case.config.discriminator.model == "student" else 0
    evaluation = rollout_seconds(case, choice, work.eval_rows, samples) * (1 + len(work.steps) - still)
    # Parameters, or their masters, and both moments.
    saved = 3.0 * case.policy.trained * ITEM[case.config.student.dtype]
    if case.has_discriminator:
        share = work.eval_rows * (work.prompt + work.teacher + samples * work.response) / work.discriminator_tokens
        evaluation += looked * share * (1 + len(work.steps) - blank)
        saved += 3.0 * case.scorer.trained * ITEM[case.config.discriminator.dtype]
    count = (steps // every + len(work.steps) if every else 0) + 1
    return {
        "evaluation": evaluation,
        "checkpoint": count * saved / (case.machine.figures["file_write"] * case.machine.nodes),
    }
