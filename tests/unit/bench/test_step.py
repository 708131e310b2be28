"""The benchmark of the whole step: its clock, its counts, its ratios, and nothing shown of a failed gate."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import __main__ as command
from bench import record, tables_step
from bench.step import comparison, flops
from bench.step.flops import Lengths, Widths
from bench.step.worker import Clock
from bench.suites import step
from gadcore.data.groups import GroupTokens
from tests.support.tiny import tiny_model

WIDTHS = Widths(hidden=64, layers=2, query=64, key=32, mlp=96, vocabulary=320)


def answer(*, ours: bool, gib: float = 1.0, **seconds: float) -> dict[str, Any]:
    """One timed step as a process reports it; all on one thread."""
    out: dict[str, Any] = {"cpu": seconds, "wall": {phase: 2 * s for phase, s in seconds.items()}}
    out |= {"peak_bytes": int(gib * 2**30), "loaded_bytes": 2**29, "response_tokens": 64}
    if ours:
        out |= {"flops": {"generate": 100, "policy": 300}, "flops_per_s": 100.0}
    return out


def row(**changes: Any) -> dict[str, Any]:
    ours = [answer(ours=True, generate=2.0, policy=4.0, optimizer=2.0)] * 3
    theirs = [answer(ours=False, gib=2.0, generate=30.0, policy=18.0)] * 3
    made = {
        "op": "GAD step",
        "opponent": "TRL",
        "case": "64x32",
        "shape": {"P": 64, "R": 32, "N": 8, "B": 2},
        "threads": 1,
        "config": {"lengths": "forced", "model": "random"},
        "error": {"ours": {"rewards": 1e-7}, "TRL": {"rewards": 2e-7}},
        "tolerance": 1e-5,
        "gate": "pass",
        **comparison.compare(ours, theirs, 1),
    }
    return record.stamped("step", [made | changes])[0]


# -- the clock


def test_nested_phases_count_once() -> None:
    clock = Clock()
    with clock("outer"):
        time.sleep(0.02)
        with clock("inner"):
            time.sleep(0.05)
    with clock("inner"):
        time.sleep(0.01)
    clock.lap()
    assert set(clock.wall) == {"other", "outer", "inner"}
    assert 0.015 < clock.wall["outer"] < 0.05
    assert clock.wall["inner"] > 0.055
    # Sleeping takes no processor.
    assert clock.cpu["inner"] < 0.03


def test_a_phase_ends_where_its_call_raises() -> None:
    class Owner:
        def fail(self) -> None:
            raise ValueError

    clock, owner = Clock(), Owner()
    clock.wrap(owner, "fail", lambda: "phase")
    with pytest.raises(ValueError):
        owner.fail()
    clock.reset()
    time.sleep(0.01)
    clock.lap()
    assert set(clock.wall) == {"other"}


# -- FLOPs


def test_products_of_a_row_are_those_that_torch_counts() -> None:
    """One response: the packed row is an ordinary sequence. torch counts attention over all pairs, masked or not."""
    model, prompt, response = tiny_model(), 7, 6
    # It knows no FLOPs of the CPU's fused attention.
    model.set_attn_implementation("eager")
    tokens = prompt + response - 1
    with FlopCounterMode(display=False) as counter:
        model.base_model(torch.arange(tokens)[None], use_cache=False)
    widths = Widths.of(model.config)
    head_dim = 32
    masked = tokens * tokens - flops.triangle(tokens)
    expected = counter.get_total_flops() - 2 * 2 * 2 * masked * 2 * head_dim + widths.head(response)
    # Nothing is read of the last layer at the prompt's tokens but the last.
    expected -= widths.layer(prompt - 1, 0, flops.triangle(prompt - 1))
    assert flops.forward(widths, [Lengths(prompt, (response,))]) == expected


def test_a_prompt_counts_once_and_pairs_are_those_of_the_packed_layout() -> None:
    group = Lengths(5, (3, 4))
    packed = GroupTokens(tuple(range(5)), (tuple(range(2)), tuple(range(3))))
    body = WIDTHS.layers * WIDTHS.layer(packed.tokens, packed.tokens, packed.pairs)
    unread = WIDTHS.layer(4, 0, flops.triangle(4))
    assert flops.forward(WIDTHS, [group]) == body - unread + WIDTHS.head(7)
    twice = flops.forward(WIDTHS, [Lengths(5, (3,)), Lengths(5, (4,))])
    alone = WIDTHS.layers * WIDTHS.layer(5, 5, flops.triangle(5))
    assert twice - flops.forward(WIDTHS, [group]) == alone - unread


def test_the_last_layer_of_scores_asks_for_last_tokens_only() -> None:
    full = flops.scores(WIDTHS, [Lengths(5, (3, 4))])
    packed = GroupTokens(tuple(range(5)), (tuple(range(3)), tuple(range(4))))
    saved = WIDTHS.layer(packed.tokens, packed.tokens, packed.pairs) - WIDTHS.layer(2, packed.tokens, 5 + 3 + 5 + 4)
    assert full == 2 * WIDTHS.layer(packed.tokens, packed.tokens, packed.pairs) - saved


def test_the_opponents_schedules_repeat_what_the_packed_step_does_once() -> None:
    # Without a prompt and with one sample nothing is shared: what is left are the passes.
    alone = flops.packed(WIDTHS, 1, 50, 1)
    body = flops.padded(WIDTHS, 1, 51, logits=0)
    head = WIDTHS.head(50)
    assert flops.padded(WIDTHS, 1, 51, logits=50) == body + head
    # 5 of G with the head, one of D for rewards, 3 of D over two rows.
    assert flops.trl(WIDTHS, 1, 50, 1) == 5 * (body + head) + body + 3 * 2 * body
    once = flops.forward(WIDTHS, [Lengths(1, (50,))])
    whole = flops.padded(WIDTHS, 1, 51, logits=51)
    assert flops.literal(WIDTHS, 1, 50, 1) == once + 5 * whole + body + 3 * 2 * body
    assert flops.literal(WIDTHS, 1, 50, 1, recompute=True) == flops.literal(WIDTHS, 1, 50, 1) + whole + 2 * body
    assert alone < flops.trl(WIDTHS, 1, 50, 1) < flops.literal(WIDTHS, 1, 50, 1)
    # Eight samples of a long prompt: the teacher's row is repeated eight times.
    sizes = (WIDTHS, 200, 10, 8)
    assert flops.literal(*sizes) > flops.trl(*sizes) > 4 * flops.packed(*sizes)


# -- the arithmetic of a comparison


def test_ratios_with_and_without_sampling_memory_and_limit() -> None:
    found = row()
    assert found["clock"] == "cpu"
    assert found["ratio"] == 48 / 8
    assert found["ratio_without_sampling"] == 18 / 6
    assert found["ratio_their_sampling_free"] == 18 / 8
    assert found["memory_ratio"] == 0.5
    assert found["ours"]["peak_over_loaded_bytes"] == 2**29
    # 100 FLOPs at 100 a second are 1 s of the 2 s of generate; 300 of the 4 s of policy; 400 of 8 s in all.
    assert found["limit"]["share"] == {"generate": 0.5, "policy": 0.75, "step": 0.5}


def test_more_threads_are_timed_by_the_wall() -> None:
    ours = [answer(ours=True, generate=2.0, policy=4.0)]
    found = comparison.compare(ours, [answer(ours=False, policy=3.0)], 2)
    assert (found["clock"], found["ours"]["median_s"], found["theirs"]["median_s"]) == ("wall", 12.0, 6.0)


@pytest.mark.parametrize("error", [2e-5, math.nan])
def test_one_error_above_the_tolerance_fails_a_gate(error: float) -> None:
    assert comparison.within({"rewards": 1e-6, "student gradient": 9e-6, "student worst parameter": 9e-5})
    assert not comparison.within({"rewards": 1e-6, "student gradient": error})


def test_no_speed_up_is_shown_behind_a_failed_gate() -> None:
    good, bad = row(), row(gate="fail")
    assert "x6.00" in comparison.line(good)
    assert "x6" not in comparison.line(bad) and "FAILED" in comparison.line(bad)
    shown = tables_step.document(lambda suite: [good])
    assert "6.00" in shown and "0.50" in shown and "75%" in shown
    profiled = good | {"profile": {"cpu_s": 8.0, "operations": [["aten::mm", 6.0, 12], ["other operations", 1.0, 3]]}}
    shown = tables_step.document(lambda suite: [profiled])
    assert "| `aten::mm` | 6.00 | 75.0% | 12 |" in shown and "| outside of operations | 1.00 | 12.5% |  |" in shown
    hidden = tables_step.document(lambda suite: [bad])
    assert "gate FAILED" in hidden and "6.00" not in hidden and "75%" not in hidden


def test_document_is_what_the_results_give() -> None:
    """After a new result: python -m bench tables."""
    assert tables_step.DOCUMENT.read_text(encoding="utf-8") == tables_step.document()


def test_document_says_where_nothing_was_run() -> None:
    assert "Not run" in tables_step.document(lambda suite: [])


# -- the command


def test_rows_of_other_cases_stay_in_the_file(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "step.json"
    record.write(out, [row(case="64x32", note="old"), row(case="256x64", note="old")])
    monkeypatch.setattr(step, "run", lambda *_, **__: iter([row(case="64x32", note="new")]))
    assert command.main(["step", "--cases", "64x32", "--out", str(out)]) == 0
    assert [(r["case"], r["note"]) for r in record.read(out)] == [("64x32", "new"), ("256x64", "old")]


def test_a_failed_gate_is_an_exit_code(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "run", lambda *_, **__: iter([row(gate="fail")]))
    assert command.main(["step", "--out", str(tmp_path / "step.json")]) == 1


def test_unknown_cases_and_missing_rows_are_refused(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["step", "--cases", "64x33"]) == 2
    assert "64x33" in capsys.readouterr().err
    assert (
        command.main(["step", "--cases", "real", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "o")]) == 1
    )
    assert "--data" in capsys.readouterr().err
    assert command.main(["kernels", "--cases", "real"]) == 2
    assert command.main(["step", "--beside", "verl"]) == 2
    assert "no opponent verl" in capsys.readouterr().err
    assert command.main(["rollout", "--steps", "2"]) == 2
