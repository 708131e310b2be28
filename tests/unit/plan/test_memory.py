"""Bytes of states: by hand for round numbers, and what offload, ranks and settings change."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gadcore.config.settings import (
    AlgorithmSettings,
    Config,
    DiscriminatorSettings,
    HFRollout,
    MemorySettings,
    ScheduleSettings,
    StudentSettings,
    VLLMRollout,
)
from gadcore.kernels.linear_logprob import KEEP_BYTES
from gadcore.memory.holdings import ALWAYS, NEEDS
from gadcore.models.host_master import SLICES_BYTES
from gadcore.plan.memory import Case, Choice, held, holdings, host_bytes, needed_kv, part_tokens, peak
from gadcore.plan.planning import advise, as_given, make_plan, utilisation
from tests.support.plan_cases import preset_case, round_case

CHOICE = Choice("off", 1 << 20, 640.0)


def config(offload="auto", **sections) -> Config:
    return Config(memory=MemorySettings(offload=offload), **sections)


def test_holdings_are_what_the_settings_say() -> None:
    case = round_case(kind="cuda", ranks=4, config=config(rollout=VLLMRollout(dtype="bfloat16")))
    assert holdings(case, CHOICE) == {
        "base.parameters": 0.0,
        "student.parameters": 3200.0,
        "student.gradients": 3200.0,
        "student.optimizer": 6400.0,
        "reference.parameters": 3200.0,
        "discriminator.parameters": 3210.0,
        "discriminator.gradients": 3210.0,
        "discriminator.optimizer": 6420.0,
        "engine.weights": 6400.0,  # Whole on every rank.
        "engine.kv_cache": 640.0,
    }
    assert holdings(case, replace(CHOICE, tensor_parallel=2))["engine.weights"] == 3200.0
    without = replace(case, config=config(algorithm=AlgorithmSettings(kl_coef=0.0)))
    assert holdings(without, CHOICE)["reference.parameters"] == 0


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_an_engine_on_the_trainers_weights_holds_nothing(kind: str) -> None:
    case = round_case(kind=kind, config=config(rollout=HFRollout()))
    assert case.sequences_at_once == case.work.samples
    for plan in (as_given(case), make_plan(case)):
        assert plan.fits and plan.choice.kv_bytes == 0
        assert not {name for name in plan.memory["rollout"].held if name.startswith("engine.")}


def test_with_offload_a_state_holds_what_it_needs() -> None:
    case = round_case(kind="cuda", config=config("pinned"))
    for state, needed in NEEDS.items():
        # Nothing lies frozen under adapters.
        assert set(held(case, CHOICE, state)) == needed - ALWAYS


def test_without_offload_everything_stays_but_gradients_and_a_sleeping_sampler() -> None:
    gpu = round_case(kind="cuda", config=config("none"))
    needed = {n for names in NEEDS.values() for n in names - ALWAYS}
    stays = {n for n in needed if not n.endswith("gradients") and "engine" not in n}
    assert set(held(gpu, CHOICE, "rest")) == stays
    assert set(held(gpu, CHOICE, "student")) == stays | {"student.gradients"}
    assert set(held(gpu, CHOICE, "rollout")) == stays | {"engine.weights", "engine.kv_cache"}
    cpu = round_case(config=config("none", rollout=VLLMRollout(dtype="bfloat16")))
    assert set(held(cpu, CHOICE, "rest")) == stays
    assert set(held(cpu, CHOICE, "rollout")) == stays | {"engine.weights", "engine.kv_cache"}


def test_shared_weights_are_counted_once() -> None:
    shared = round_case(config=config("file"))
    assert shared.shared and set(held(shared, CHOICE, "rollout")) == {"student.parameters", "engine.kv_cache"}
    apart = replace(shared, config=Config(memory=MemorySettings(offload="file", shared_weights=False)))
    assert set(held(apart, CHOICE, "rollout")) == {"engine.weights", "engine.kv_cache"}


def test_auto_is_pinned_on_cuda_and_takes_host_memory() -> None:
    gpu, cpu = round_case(kind="cuda", ranks=2, config=config()), round_case(config=config())
    assert (gpu.offload, cpu.offload) == ("pinned", "none")
    # Of each rank: half of the student four times, of the discriminator three times; a sleeping sampler keeps nothing.
    assert host_bytes(gpu, CHOICE) == 2 * (4 * 12800 + 3 * 12840) / 2
    assert host_bytes(cpu, CHOICE) == 0
    none = replace(gpu, config=config("none"))
    assert host_bytes(none, CHOICE) == 0


def test_activations_follow_the_mode_and_the_micro_batch() -> None:
    case = preset_case("qwen2.5-7b", "h100-80gb-x8")
    small, large = (peak(case, Choice("off", tokens, 0.0))["student"] for tokens in (8192, 16384))
    assert large.working["activations and head"] > 1.7 * small.working["activations and head"]
    modes = [peak(case, Choice(mode, 16384, 0.0))["student"].total for mode in ("off", "selective", "full")]
    assert modes == sorted(modes, reverse=True)
    # A response of full length is not cut: a smaller budget takes no less.
    assert part_tokens(case, 1024, True) == 2048 + 1536 and part_tokens(case, 1024, False) == 2048 + 2 * 1536


WHOLE = ("--student.adapter", "none", "--discriminator.adapter", "none", "--rollout.group_size", "4")


@pytest.mark.parametrize(("vocabulary", "held"), [(100, None), (10**9, KEEP_BYTES)])
def test_log_probs_for_a_loss_of_ones_own_and_for_soda_hold_logits_on_a_cpu(vocabulary: int, held: int | None) -> None:
    def head(case: Case) -> float:
        case = replace(case, student=replace(case.student, vocabulary=vocabulary))
        return peak(case, CHOICE)["student"].working["activations and head"]

    fused = round_case()
    own = replace(fused, config=config(algorithm=AlgorithmSettings(loss="mine:loss")))
    soda = replace(fused, work=replace(fused.work, steps={"soda": 3}))
    # 60 packed tokens, without the last of every sample; 24 in 34 are of a response.
    logits = 4 * vocabulary * 60 * 24 / 34
    assert head(own) - head(fused) == head(soda) - head(fused) == pytest.approx(held or logits)
    on_gpus = round_case(kind="cuda", ranks=2)
    assert head(on_gpus) == head(replace(on_gpus, config=own.config))


def test_gradients_come_as_activations_go_in_a_single_micro_batch() -> None:
    case = preset_case("smollm2-cpu", "here", *WHOLE)
    tokens, gradients = case.work.discriminator_tokens, 4 * case.discriminator.scalar_parameters
    last = tokens * (4 * (576 + 128) + 12)
    malloc = peak(case, Choice("off", 4096, 0.0))["discriminator"]
    # What activations leave is not given back while the pass goes on. Norms and gated activations are not among them.
    again = 4 * (2 * 576 + 1536)
    assert malloc.working["activations and head"] == pytest.approx((33836 - again) * 30 * tokens + last, rel=1e-6)
    gpu = replace(case, machine=preset_case("smollm2-cpu", "h100-80gb-x1", *WHOLE).machine)
    one, many = (peak(gpu, Choice("off", cut, 0.0))["discriminator"] for cut in (4096, 256))
    assert one.held == many.held
    # The fullest moment is that of all activations, before the first gradient. The last layer keeps its input, the norm
    # of it, keys and values; around the layers are the rotation and the token ids.
    kept = 29 * 33836 + 4 * (576 + 576 + 3 * 192) + 4 * 2 * 64 + 12
    assert one.working["activations"] == pytest.approx(kept * tokens - gradients, rel=1e-6)
    assert 0 < many.working["activations"] < kept * tokens


def test_a_cpus_cache_takes_what_was_written() -> None:
    case, choice = preset_case("smollm2-cpu", "here"), Choice("off", 2048, 1e9)
    assert held(case, choice, "rollout")["engine.kv_cache"] == needed_kv(case, 1) < 1e9
    gpu = replace(case, machine=preset_case("smollm2-cpu", "h100-80gb-x1").machine)
    assert held(gpu, choice, "rollout")["engine.kv_cache"] == 1e9


HOST = {"student": StudentSettings(master="host"), "discriminator": DiscriminatorSettings(master="host")}


def test_masters_in_host_memory_take_none_of_the_device() -> None:
    case = round_case(kind="cuda", config=config(**HOST))
    found = holdings(case, CHOICE)
    assert (found["student.parameters"], found["student.gradients"]) == (2 * 3200, 4 * 3200)
    assert found["student.optimizer"] == found["discriminator.optimizer"] == 0
    assert found["reference.parameters"] == 2 * 3200
    # Float32 weights and two moments of both, and what waits: bfloat16 weights of both and of the reference.
    assert host_bytes(case, CHOICE) == 12 * (3200 + 3210) + 2 * (3200 + 3200 + 3210)
    states = peak(case, CHOICE)
    assert states["student_update"].working["slices of the masters"] == 12 * 3200
    assert "slices of the masters" not in states["student"].working
    # They are there without offload as well, and on a CPU in the one memory that there is.
    assert host_bytes(replace(case, config=config("none", **HOST)), CHOICE) == 12 * (3200 + 3210)
    cpu = peak(round_case(config=config(**HOST)), CHOICE)
    assert all(memory.working["masters and moments"] == 12 * (3200 + 3210) for memory in cpu.values())
    large = preset_case("qwen2.5-7b", "h100-80gb-x1", *flags("student.master = host"))
    assert peak(large, CHOICE)["student_update"].working["slices of the masters"] == SLICES_BYTES


def test_a_reference_policy_is_kept_as_the_products_read_it() -> None:
    tied, plain = preset_case("qwen2.5-3b", "h100-80gb-x1"), preset_case("qwen2.5-7b", "h100-80gb-x1")
    for case, wide in ((tied, tied.student.head), (plain, plain.student.head)):
        d = case.student
        rest = d.parameters - d.layers * d.matrices - (0 if d.tied else d.head)
        assert holdings(case, CHOICE)["reference.parameters"] == 2 * (d.parameters - rest) + 4 * rest
        # The embedding is looked up in float32; norms and biases are hardly anything.
        assert wide <= rest < 1.01 * wide
    none = preset_case("qwen2.5-3b", "h100-80gb-x1", "--algorithm.kl_coef=0")
    assert "reference" not in peak(none, CHOICE)


def test_moments_and_the_reference_are_not_beside_activations() -> None:
    states = peak(preset_case("qwen2.5-3b", "h100-80gb-x1"), Choice("full", 16384, 20e9))
    assert set(states["student"].held) == {"student.parameters", "student.gradients"}
    assert set(states["student_update"].working) == {"process"}
    assert set(states["reference"].held) == {"reference.parameters"}
    assert states["reference"].total < states["student"].total


def test_casts_are_kept_where_layers_are() -> None:
    case = preset_case("qwen2.5-3b", "h100-80gb-x1")
    d = case.student
    kept, again = (
        peak(case, Choice(mode, 2048, 0.0))["student"].working["casts of the weights"] for mode in ("off", "full")
    )
    # That of the head is its own; where layers are computed again, none of theirs is there while it computes.
    assert kept == 2 * d.layers * d.matrices and again in (0, 2 * d.matrices)
    scored = peak(case, Choice("selective", 2048, 0.0))["discriminator"].working["casts of the weights"]
    assert scored == 2 * d.matrices


def test_the_baseline_holds_no_discriminator_and_no_reference() -> None:
    case = round_case(kind="cuda", config=config("none"))
    case = replace(case, work=replace(case.work, steps={"seqkd": 3}))
    states = peak(case, CHOICE)
    assert set(states) == {"synchronise", "rollout", "student", "student_update", "rest"}
    assert set(states["rest"].held) == {"student.parameters", "student.optimizer"}


def test_a_3b_fits_one_card_at_its_presets_micro_batch() -> None:
    given = as_given(preset_case("qwen2.5-3b", "h100-80gb-x1"))
    assert given.fits and given.choice.micro_batch_tokens == 16384


def test_graphs_take_memory_of_the_samplers_share() -> None:
    graphs, eager = (
        preset_case("qwen2.5-3b", "h100-80gb-x1", f"--rollout.enforce_eager={e}") for e in ("false", "true")
    )
    taken = [as_given(case).choice.kv_bytes for case in (graphs, eager)]
    assert taken[1] - taken[0] == graphs.machine.figures["engine_graph_bytes"] > 0


def test_more_ranks_take_less_each() -> None:
    totals = [
        peak(preset_case("qwen2.5-14b", machine), Choice("full", 8192, 0.0))["student"].total
        for machine in ("h100-80gb-x2", "h100-80gb-x8", "2x8-h100-80gb")
    ]
    assert totals[0] > totals[1] > totals[2]


def test_the_papers_case_fits_on_16_and_not_on_1() -> None:
    plan = make_plan(preset_case("qwen2.5-14b", "2x8-h100-80gb"))
    assert plan.fits and plan.room >= 0 and 0 < utilisation(plan) < 1
    assert all(memory.total <= plan.case.machine.usable_bytes for memory in plan.memory.values())
    alone = make_plan(preset_case("qwen2.5-14b", "h100-80gb-x1"))
    assert not alone.fits and "student" in alone.problems[0]
    assert f"{-alone.room / 1e9:.1f} GB" in alone.problems[0]


def test_advice_makes_it_fit() -> None:
    plan = make_plan(preset_case("qwen2.5-7b", "h100-80gb-x1"))
    advice = advise(plan)
    alone = {item.change: item for item in advice}
    assert not alone["algorithm.kl_coef = 0"].fits
    masters = "student.master = host and discriminator.master = host"
    assert alone[masters].fits and alone[masters].room > plan.room
    assert not any(item.change.startswith(masters) and item.change != masters for item in advice)
    changed = make_plan(preset_case("qwen2.5-7b", "h100-80gb-x1", *flags(masters)))
    assert changed.fits and changed.room == alone[masters].room and advise(changed) == []
    ranks = next(item for item in advice if "ranks" in item.change)
    count = int(ranks.change.split()[0])
    assert ranks.fits and make_plan(preset_case("qwen2.5-7b", f"h100-80gb-x{count}")).fits
    assert not make_plan(preset_case("qwen2.5-7b", f"h100-80gb-x{count // 2}")).fits
    assert not any("ranks" in item.change for item in advise(plan, ranks=False))


def flags(change: str) -> list[str]:
    """A change of advice as one writes it on a command line."""
    return [f"--{part.replace(' = ', '=')}" for part in change.split(" and ")]


def test_changes_that_fit_only_together_are_advised_together() -> None:
    # A 3B on a smaller card: no change alone is enough.
    case = preset_case("qwen2.5-3b", "h100-80gb-x1")
    figures = case.machine.figures.replaced({"memory_bytes": 26.5e9}, "test")
    case = replace(case, machine=replace(case.machine, figures=figures))
    advice = advise(make_plan(case))
    single = [item for item in advice if " and " not in item.change and "ranks" not in item.change]
    assert single and not any(item.fits for item in single)
    together = next(item for item in advice if item.fits and "ranks" not in item.change)
    both = preset_case("qwen2.5-3b", "h100-80gb-x1", *flags(together.change))
    assert make_plan(replace(both, machine=case.machine)).room == together.room


def test_offload_is_advised_where_it_is_off() -> None:
    plan = make_plan(preset_case("qwen2.5-3b", "h100-80gb-x1", "--memory.offload", "none"))
    offload = advise(plan)[0]
    assert not plan.fits and offload.change == "memory.offload = pinned" and offload.fits


def test_the_cache_takes_what_is_left_and_no_more_than_is_needed() -> None:
    roomy, tight = (make_plan(preset_case(name, "h100-80gb-x8")) for name in ("qwen2.5-3b", "qwen2.5-14b"))
    assert roomy.choice.kv_bytes == needed_kv(roomy.case, 1) and roomy.memory["rollout"].total < 76e9
    assert tight.choice.kv_bytes < needed_kv(tight.case, 1)
    assert tight.memory["rollout"].total == pytest.approx(tight.case.machine.usable_bytes)
    # On 7 GB of memory each, weights of 29.5 GB are cut over all 8.
    small = tight.case.machine.figures.replaced({"memory_bytes": 10e9, "engine_bytes": 0.5e9}, "test")
    cut = make_plan(replace(tight.case, machine=replace(tight.case.machine, figures=small)))
    assert cut.choice.tensor_parallel == 8


def test_a_mode_that_was_asked_for_is_kept() -> None:
    schedule = ScheduleSettings(activation_checkpointing="full")
    case = preset_case("qwen2.5-3b", "h100-80gb-x8")
    case = replace(case, config=case.config.model_copy(update={"schedule": schedule}))
    assert make_plan(case).choice.mode == as_given(case).choice.mode == "full"
    assert as_given(case).choice.micro_batch_tokens == schedule.micro_batch_tokens
