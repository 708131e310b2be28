"""Seconds: by hand for round numbers, and in the right direction for real ones."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from gadcore.config import loading
from gadcore.config.settings import (
    AlgorithmSettings,
    Config,
    DiscriminatorSettings,
    MemorySettings,
    StudentSettings,
    VLLMRollout,
)
from gadcore.errors import UserError
from gadcore.plan.memory import Choice
from gadcore.plan.planning import make_plan
from gadcore.plan.roles import Role
from gadcore.plan.settings import PlanSettings
from gadcore.plan.time import (
    Pass,
    decode_step_seconds,
    offload_seconds,
    optimizer_seconds,
    pass_seconds,
    rollout_seconds,
    run_time,
)
from gadcore.plan.workload import read_workload
from tests.support.plan_cases import preset_case, round_case

CHOICE = Choice("off", 1 << 20, 1e9)


def test_a_pass_by_hand() -> None:
    case = round_case()
    forward = Pass(tokens=100, pairs=50, responses=20, head=1, backward=False)
    # 2 layers x 1000 entries x 2 x 100 tokens at 1e6, doubled by what is not products; 4 x 2 layers x 10 x 50 pairs and
    # 2 x 1000 x 20 of the head, each at half the rate.
    expected = 0.4 * 2 + 0.004 * 2 + 0.04 * 2
    assert pass_seconds(case, CHOICE, case.student, "student", forward) == pytest.approx(expected)
    trained = replace(forward, head=3, backward=True)
    expected = 3 * 0.4 * 2 + 3.5 * 0.004 * 2 + 3 * 0.04 * 2
    assert pass_seconds(case, CHOICE, case.student, "student", trained) == pytest.approx(expected)
    full = replace(CHOICE, mode="full")
    expected = 4 * 0.4 * 2 + 4.5 * 0.004 * 2 + 3 * 0.04 * 2
    assert pass_seconds(case, full, case.student, "student", trained) == pytest.approx(expected)
    selective = replace(CHOICE, mode="selective")
    expected = 3.5 * 0.4 * 2 + 3.5 * 0.004 * 2 + 3 * 0.04 * 2
    assert pass_seconds(case, selective, case.student, "student", trained) == pytest.approx(expected)


def test_communication_counts_where_computing_does_not_hide_it() -> None:
    case = round_case(kind="cuda", ranks=2, node_link=1e6, overlap_share=1e-9)
    work = Pass(tokens=100, pairs=0, responses=0, head=0, backward=True)
    # Two gathers and one reduction of 2200 float32 in layers, one gather and one reduction of 1000 others, at 1e6
    # bytes/s, of which a ring of 2 moves half.
    expected = 3 * 0.4 * 2 / 2 + (2200 * 12 + 1000 * 8) / 1e6 / 2
    assert pass_seconds(case, CHOICE, case.student, "student", work) == pytest.approx(expected)
    cut, expected = replace(CHOICE, micro_batch_tokens=25), 1.2 + 2 * (2200 * 12 + 1000 * 8) / 1e6 / 2
    assert pass_seconds(case, cut, case.student, "student", work) == pytest.approx(expected)
    hidden = round_case(kind="cuda", ranks=2)
    assert pass_seconds(hidden, CHOICE, hidden.student, "student", work) == pytest.approx(1.2)


def test_a_decoding_step_by_hand() -> None:
    cpu = round_case()
    # Reading 3000 float32 takes 12 ms, products of one row 6 ms, of 4 rows 24 ms; 5 keys x 80 bytes a row.
    beside = 0.5 + 2 * 0.25
    assert decode_step_seconds(cpu, CHOICE, 1, 5) == pytest.approx(beside + 0.012 + 0.0004)
    assert decode_step_seconds(cpu, CHOICE, 4, 5) == pytest.approx(beside + 0.024 + 0.0016)
    gpu = round_case(kind="cuda", engine_layer_seconds=0.001)
    # The products run at half the rate, and nothing waits for the launches.
    assert decode_step_seconds(gpu, CHOICE, 4, 5) == pytest.approx(0.5 + 0.048)
    assert decode_step_seconds(gpu, replace(CHOICE, tensor_parallel=2), 4, 5) == pytest.approx(0.5 + 0.024)


def test_sampling_takes_as_many_steps_as_the_longest_response() -> None:
    case = round_case(engine_step_seconds=1.0, engine_layer_seconds=1e-9)
    # Every response has the full length: 8 steps, and what the products add.
    case = replace(case, work=replace(case.work, response=8.0))
    assert rollout_seconds(case, CHOICE, 1, 4) == pytest.approx(8.0, rel=0.06)
    # Half the sequences at a time: twice the steps.
    halved = case.config.model_copy(update={"rollout": VLLMRollout(max_num_seqs=2)})
    assert rollout_seconds(replace(case, config=halved), CHOICE, 1, 4) == pytest.approx(16.0, rel=0.06)
    # A cache that holds one sequence: one after the other.
    one = replace(CHOICE, kv_bytes=(10 / 4 + 8) * case.student.kv_bytes(4))
    assert rollout_seconds(case, one, 1, 4) == pytest.approx(32.0, rel=0.06)


def test_the_optimizer_and_offload_by_hand() -> None:
    case = round_case(kind="cuda", config=Config(memory=MemorySettings(offload="pinned")))
    assert optimizer_seconds(case, Role(3200, 4), case.student_precision) == pytest.approx(0.128)
    # Into and out of the device once a step: the student's moments and parameters, the discriminator's likewise; the
    # reference in only. The student's parameters stay from its own state to synchronise.
    student, discriminator = 12800, 12840
    moved = 2 * 2 * student + (student + student) + 2 * 3 * discriminator + student
    assert offload_seconds(case, CHOICE) == pytest.approx(moved / 1e6)
    none = replace(case, config=Config(memory=MemorySettings(offload="none")))
    assert offload_seconds(none, CHOICE) == 0
    assert offload_seconds(round_case(), CHOICE) == 0
    # Shared weights stay for rollout and leave before D; files are read back three times as fast.
    files = round_case(config=Config(memory=MemorySettings(offload="file")), file_read=3e6)
    expected = 3 * (student + discriminator) + (4 * student + 3 * discriminator) / 3
    assert offload_seconds(files, CHOICE) == pytest.approx(expected / 1e6)


def test_masters_come_and_leave_while_they_are_updated() -> None:
    config = Config(student=StudentSettings(master="host"))
    case = round_case(kind="cuda", config=config, host_link=1e5)
    # 12 bytes a weight each way, at half the link's 1e5 bytes/s each while both are in use.
    assert optimizer_seconds(case, Role(3200, 4), case.student_precision) == pytest.approx(12 * 3200 / 0.5e5)
    # In the one memory of a CPU nothing moves.
    cpu = round_case(config=config)
    assert optimizer_seconds(cpu, Role(3200, 4), cpu.student_precision) == pytest.approx(0.128)


def test_a_micro_batch_casts_all_weights_and_sums_all_gradients() -> None:
    config = Config(student=StudentSettings(autocast="bfloat16"))
    case = round_case(kind="cuda", config=config)
    work = Pass(tokens=100, pairs=0, responses=0, head=0, backward=True)
    one, four = (
        pass_seconds(case, replace(CHOICE, micro_batch_tokens=cut), case.student, "student", work) for cut in (100, 25)
    )
    # Read in 4 bytes, written in 2; a gradient made in 2, cast from 2 to 4, and added: 4 read twice and written once.
    assert four - one == pytest.approx(3 * 3200 * (6 + 2 + 6 + 12) / 1e6)
    again = pass_seconds(case, replace(CHOICE, mode="selective"), case.student, "student", work)
    same = pass_seconds(round_case(config=config), CHOICE, case.student, "student", work)
    assert one - same == pytest.approx(3200 * 26 / 1e6)
    assert again - one == pytest.approx(0.5 * 0.4 * 2 + 3200 * 6 / 1e6)


def test_graphs_leave_out_launches_as_far_as_they_reach() -> None:
    graphs = round_case(kind="cuda", config=Config(rollout=VLLMRollout(enforce_eager=False)), engine_layer_seconds=1.0)
    # Captured up to 4 sequences.
    assert decode_step_seconds(graphs, CHOICE, 4, 5) < 1 < 2 < decode_step_seconds(graphs, CHOICE, 5, 5)


def test_a_run_is_its_steps() -> None:
    case = round_case()
    time = run_time(case, CHOICE)
    warmup, gad = (sum(phases.values()) for phases in (time.steps["warmup"], time.steps["gad"]))
    assert time.total == pytest.approx(3 * warmup + 5 * gad + sum(time.once.values()))
    assert sum(time.phases.values()) == time.total
    assert time.once["evaluation"] == 0 and time.once["checkpoint"] == pytest.approx(3 * 12 * 6410 / 1e6)


def test_an_evaluation_draws_and_scores_only_what_the_run_does() -> None:
    """A fresh head is not asked before its warmup; a student that has not moved is not drawn again."""

    def evaluation(model: str = "student", *, moves: bool = True) -> float:
        algorithm, scorer = AlgorithmSettings(student_warmup=moves), DiscriminatorSettings(model=model)
        case = round_case(config=Config(algorithm=algorithm, discriminator=scorer))
        work = replace(case.work, eval_rows=2, steps={"sft": 1, "warmup": 3, "gad": 5})
        return run_time(replace(case, work=work), CHOICE).once["evaluation"]

    # Each of four is drawn, two are scored; by a discriminator of its own all are; three are drawn.
    all_drawn, all_scored, three_drawn = evaluation(), evaluation("another"), evaluation(moves=False)
    scored = (all_scored - all_drawn) / 2
    assert scored > 0 and 4 * (all_drawn - three_drawn) + 2 * scored == pytest.approx(all_drawn)


def test_settings_that_do_less_take_less() -> None:
    def gad(**algorithm: object) -> dict[str, float]:
        config = Config(algorithm=AlgorithmSettings(**algorithm))
        return run_time(round_case(config=config), CHOICE).steps["gad"]

    plain = gad()
    assert gad(kl_coef=0.0)["student"] < plain["student"]
    assert gad(discriminator_steps=2)["discriminator"] == pytest.approx(2 * plain["discriminator"])
    assert gad(freeze_discriminator=True)["discriminator"] < gad(discriminator_every=2)["discriminator"]
    assert gad(discriminator_every=2)["discriminator"] < plain["discriminator"]


@pytest.mark.parametrize("longer", ["prompt", "response", "teacher", "prompts"])
def test_more_work_takes_longer(longer) -> None:
    case = preset_case("qwen2.5-14b", "2x8-h100-80gb")
    more = replace(case, work=replace(case.work, **{longer: getattr(case.work, longer) * 1.5}))
    choice = Choice("full", 8192, 40e9)
    assert run_time(more, choice).total > run_time(case, choice).total


def test_more_ranks_are_faster_and_float32_products_slower() -> None:
    hours = [
        make_plan(preset_case("qwen2.5-14b", machine)).time.total / 3600
        for machine in ("h100-80gb-x8", "2x8-h100-80gb")
    ]
    assert hours[0] > hours[1] > 1 and math.isfinite(hours[0])
    case = preset_case("qwen2.5-14b", "2x8-h100-80gb")
    plain = case.config.model_copy(update={"student": StudentSettings(autocast="none")})
    choice = Choice("full", 8192, 40e9)
    slow, fast = (run_time(c, choice).steps["gad"] for c in (replace(case, config=plain), case))
    assert slow["student"] > 5 * fast["student"] and slow["discriminator"] == fast["discriminator"]


def test_the_papers_steps() -> None:
    work = preset_case("qwen2.5-14b", "2x8-h100-80gb").work
    # 192,014 rows in batches of 256: 751 an epoch, one of warmup and two of GAD.
    assert work.steps == {"warmup": 751, "gad": 1502}
    assert work.student_tokens == 256 * (110 + 8 * 319) and work.discriminator_tokens == 256 * (110 + 9 * 320)


def test_the_data_is_counted_where_it_is_at_hand() -> None:
    work, items = read_workload(loading.load([]), PlanSettings())
    assert work.steps == {"sft": 80, "warmup": 12, "gad": 16} and items[0].value == 240
    assert 20 < work.prompt < 96 and 20 < work.teacher == work.response < 64
    assert all("builtin" in item.why for item in items[:3])


def test_data_that_is_not_at_hand_needs_rows() -> None:
    config = loading.load(["--data.train", "someone/something"])
    with pytest.raises(UserError, match=r"data.train = someone/something.*plan.rows"):
        read_workload(config, PlanSettings())
    work, items = read_workload(config, PlanSettings(rows=100, response_tokens=30))
    assert (items[0].value, work.response, work.prompt) == (100, 30, 24) and "quarter" in items[1].why
    with pytest.raises(UserError, match=r"plan.response_tokens = 65 .* 64"):
        read_workload(config, PlanSettings(rows=100, response_tokens=65))
