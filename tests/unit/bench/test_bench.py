"""The benchmark runner: fair order, honest gates, and a document that says what the results say."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import __main__ as command
from bench import cases, gpu, memory, record, tables
from bench.cases import COMPILED, CUT, LIGER, NAIVE, TRL, Size
from bench.compare import Case, Setup, line, measure
from bench.opponents.problem import Expected, grpo_expected, head_problem
from bench.record import Result, Timing, ratio_of
from bench.runner import Rounds, Side, interleave, order, wall
from gadcore.kernels.cpu import native

ONCE = Rounds(1, 1, 0.0)
REFERENCE = Setup("kernels", "reference", torch.float32, "cpu", 1, wall, memory.extra_peak)


def side(name: str, calls: list[str], **options: Any) -> Side:
    def call() -> dict[str, Tensor]:
        calls.append(name)
        return {}

    return Side(name, call, **options)


# -- the runner


def test_every_side_goes_first_as_often_as_any_other() -> None:
    sides = [side(name, []) for name in "abc"]
    firsts = [order(sides, index)[0].name for index in range(6)]
    lasts = [order(sides, index)[-1].name for index in range(6)]
    assert sorted(firsts) == sorted(lasts) == [*"aabbcc"]


def test_sides_take_turns_and_get_equally_many_rounds() -> None:
    calls: list[str] = []
    slow = [side(name, calls, prepare=lambda: calls.append("prepared")) for name in "ab"]
    runs = interleave(slow, Rounds(4, 4, 0.0), lambda call, n: (call(), 1.0)[1])
    assert {name: len(seconds) for name, seconds in runs.items()} == {"a": 4, "b": 4}
    done = [name for name in calls if name != "prepared"]
    assert done == [*"abbabaab"]
    assert calls[::2] == ["prepared"] * 8


def test_short_calls_are_timed_many_at_a_time() -> None:
    calls: list[str] = []
    taken: list[int] = []

    def clock(call: Any, n: int) -> float:
        taken.append(n)
        return 1e-4

    interleave([side("a", calls), side("b", calls)], Rounds(2, 2, 0.0), clock, sample_s=0.01)
    assert taken == [1, 1, 100, 100, 100, 100]


def test_rounds_fill_the_time_within_their_bounds() -> None:
    assert [Rounds(2, 5, 10.0).within(seconds) for seconds in (0.0, 3.0, 100.0)] == [5, 3, 2]


def test_sides_need_different_names() -> None:
    with pytest.raises(ValueError, match="different names"):
        interleave([side("a", []), side("a", [])], ONCE)


def test_ratio_is_taken_round_by_round() -> None:
    """A machine that became ten times slower halfway through changes no ratio."""
    assert ratio_of([1.0, 1.0, 10.0, 10.0], [2.0, 2.0, 20.0, 20.0]) == 2.0


def test_extra_peak_sees_what_a_call_used_and_gave_back() -> None:
    size = 64 * 2**20

    def call() -> float:
        return float(torch.ones(size // 4).sum())

    call()
    total, peak = memory.extra_peak(call)
    if peak is None:
        pytest.skip("this system does not let a process reset its peak")
    assert total == size // 4
    # The system counts resident pages in batches.
    assert 0.95 * size < peak < 1.25 * size


# -- the gate


def timing(runs: list[float], error: float = 1e-7, peak: int | None = 2**20) -> Timing:
    return Timing.of(runs, peak_bytes=peak, error={"loss": error})


def result(**changes: Any) -> Result:
    values: dict[str, Any] = {
        "suite": "kernels",
        "op": "linear_grpo_loss",
        "impl": "cpu",
        "opponent": "naive torch",
        "direction": "forward + backward",
        "shape": {"T": 64, "H": 32, "V": 500},
        "dtype": "float32",
        "threads": 1,
        "ours": timing([1.0, 1.1]),
        "theirs": timing([2.0, 2.2], peak=6 * 2**20),
        "ratio": 2.0,
        "gate": "pass",
        "tolerance": 1e-5,
    }
    return Result(**values | changes)


def case(got: float) -> Case:
    right = torch.ones(3)
    ours = Side("ours", lambda: {"y": torch.full((3,), got)})
    theirs = Side("theirs", lambda: {"y": right})
    return Case("op", "forward", {"T": 3}, ours, [theirs], {"y": Expected(right.double())}, ONCE)


@pytest.mark.parametrize(("got", "gate"), [(1.0, "pass"), (1.001, "fail"), (float("nan"), "fail")])
def test_gate_fails_where_ours_is_wrong(got: float, gate: str) -> None:
    (measured,) = measure(case(got), REFERENCE)
    assert measured.gate == gate
    assert (measured.speed_up is None) == (gate == "fail")
    assert ("x" in line(measured)) == (gate == "pass")


def test_gate_fails_where_the_opponent_does_not_do_the_same() -> None:
    wrong = case(1.0)
    wrong.opponents[0] = Side("theirs", lambda: {"y": torch.zeros(3)})
    assert measure(wrong, REFERENCE)[0].gate == "fail"


def test_gate_notices_a_wrong_gradient_and_a_wrong_kl_term() -> None:
    problem = head_problem(64, 32, 100, samples=4, length=8)
    expected = grpo_expected(problem)
    problem.kl_coef *= 1.01
    changed = grpo_expected(problem)
    for name in ("loss", "d_hidden", "d_weight"):
        assert expected[name].error(changed[name].value) > 1e-5


def test_inputs_are_the_same_every_time() -> None:
    first, second = (head_problem(64, 32, 100, samples=4, length=8) for _ in range(2))
    assert torch.equal(first.hidden, second.hidden) and torch.equal(first.ref_logprob, second.ref_logprob)
    with pytest.raises(ValueError, match="whole number of groups"):
        head_problem(65, 32, 100, samples=4, length=8)


# -- the opponents


def assert_all_pass(size: Size, setup: Setup = REFERENCE) -> set[str]:
    seen = set()
    for each in cases.head_cases(size, setup):
        for measured in measure(each, setup):
            assert measured.gate == "pass", line(measured)
            assert measured.theirs.error or "product" in measured.opponent
            seen.add(measured.opponent)
    return seen


def test_naive_and_trl_compute_what_we_compute() -> None:
    pytest.importorskip("trl")
    size = Size(64, 32, 500, frozenset({NAIVE, TRL}), ONCE, ONCE, length=8)
    assert assert_all_pass(size) == {"three bare products", "one bare product", "naive torch", "TRL"}


@pytest.mark.slow
def test_compiled_opponents_compute_what_we_compute() -> None:
    for package in ("cut_cross_entropy", "liger_kernel"):
        pytest.importorskip(package)
    # Two chunks of the compiled ones.
    size = Size(1024, 16, 64, frozenset({COMPILED, CUT, LIGER}), ONCE, ONCE, length=64, logprob_backward=True)
    assert assert_all_pass(size) >= {"torch.compile, chunks of 512", "cut-cross-entropy", "Liger"}


# -- records


def test_results_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "kernels.json"
    rows = record.stamped("kernels", [record.as_row(result())])
    record.write(path, rows)
    (again,) = (Result.from_json(row) for row in record.read(path))
    assert (again.ours, again.theirs, again.ratio) == (result().ours, result().theirs, 2.0)
    assert again.commit and again.machine["cores"] >= 1 and "torch" in again.versions
    assert record.read(tmp_path / "none.json") == []


def test_a_file_that_is_no_list_of_results_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="list of objects"):
        record.read(tmp_path / "x.json")


def test_timing_keeps_every_run_and_its_spread() -> None:
    assert timing([1.0, 4.0, 2.0]) == Timing([1.0, 4.0, 2.0], 2.0, 1.0, 4.0, 1.5, 2**20, {"loss": 1e-7}, None)
    assert Timing.of([1.0, 3.0], peak_bytes=None, error={}, first_s=12.0).compile_s == 10.0


def test_facts_name_neither_the_machine_nor_a_path() -> None:
    facts = json.dumps([record.machine(), record.versions(), record.commit()])
    assert platform.node() not in facts or len(platform.node()) < 3
    assert str(Path.home()) not in facts and str(record.ROOT) not in facts


def test_what_a_suite_says_itself_is_kept() -> None:
    (row,) = record.stamped("aot", [{"kernel": "k", "machine": {"target": "sm_90"}, "commit": ""}])
    assert row["machine"] == {"target": "sm_90"} and row["commit"] == record.commit() and row["suite"] == "aot"


# -- the command


def test_unknown_suite_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(["kernel"])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert all(name in said for name in ("kernels", "traffic", "aot", "tables", "'kernel'"))


@pytest.mark.parametrize("threads", ["0", "100000", "one", "1,,2"])
def test_thread_counts_that_cannot_be_are_refused(threads: str) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(["kernels", "--threads", threads])
    assert stop.value.code == 2


def test_threads_are_for_the_kernels_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["aot", "--threads", "1"]) == 2
    assert "--threads" in capsys.readouterr().err


@pytest.mark.parametrize(("gate", "code"), [("pass", 0), ("fail", 1)])
def test_a_failed_gate_is_an_exit_code(
    gate: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench.suites import kernels

    monkeypatch.setattr(kernels, "run", lambda quick: [record.as_row(result(gate=gate))])
    out = tmp_path / "out.json"
    assert command.main(["kernels", "--out", str(out)]) == code
    assert record.read(out)[0]["gate"] == gate
    assert ("FAILED" in capsys.readouterr().err) == (gate == "fail")


def test_quick_writes_no_results_unless_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench.suites import kernels

    monkeypatch.setattr(kernels, "run", lambda quick: [record.as_row(result())])
    monkeypatch.setattr(record, "write", lambda path, rows: pytest.fail(f"wrote {path}"))
    assert command.main(["kernels", "--quick"]) == 0
    assert "not written" in capsys.readouterr().out


def test_quick_suite_from_the_command_line(tmp_path: Path) -> None:
    reason = native.why_missing("cpu_linear_grpo_loss")
    if reason is not None:
        pytest.skip(reason)
    out = tmp_path / "kernels.json"
    call = [sys.executable, "-m", "bench", "kernels", "--quick", "--out", str(out)]
    done = subprocess.run(call, cwd=record.ROOT, capture_output=True, text=True, env=os.environ, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    results = [Result.from_json(row) for row in record.read(out)]
    ops = {"linear_grpo_loss", "linear_logprob", "bt_score", "grpo_ratio_loss", "linear_few_rows"}
    assert {r.op for r in results} == ops
    assert {(r.suite, r.impl, r.threads, r.gate) for r in results} == {("kernels", "cpu", 1, "pass")}
    text = tables.document(lambda suite: record.read(out) if suite == "kernels" else [])
    assert all(f"### {op}" in text for op in ops - {"linear_few_rows"})


def test_gpu_suite_says_that_it_was_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(record, "write", lambda path, rows: pytest.fail(f"wrote {path}"))
    assert command.main(["gpu"]) == 0
    assert capsys.readouterr().out.strip() == "skipped: no CUDA device"


def test_cases_of_the_gpu_suite_run() -> None:
    """On the CPU with the references: the same code but for the clock."""
    passed = [r for each in gpu.all_cases(REFERENCE, quick=True) for r in measure(each, REFERENCE) if r.gate == "pass"]
    assert {r.op for r in passed} == {"linear_grpo_loss", "linear_logprob", "bt_score", "grpo_ratio_loss"}


# -- the document


def document(*results: Result, **suites: list[dict[str, Any]]) -> str:
    rows = {"kernels": [record.as_row(r) for r in results], **suites}
    return tables.document(lambda suite: rows.get(suite, []))


def section(text: str, title: str) -> str:
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def test_document_is_what_the_results_give() -> None:
    """After a new result: python -m bench tables."""
    assert tables.DOCUMENT.read_text(encoding="utf-8") == tables.document()


def test_document_names_what_was_not_run() -> None:
    text = document()
    for suite in ("kernels", "kernel_grid", "aot", "traffic", "cuda", "gpu"):
        assert f"there is no `bench/results/{suite}.json`" in text
    missing = section(text, "What has not been measured")
    for name in ("GPU", "linear_logprob", "linear_grpo_loss", "grpo_ratio_loss", "bt_score", "sm_90", "gpu-bench"):
        assert name in missing


def test_document_shows_a_speed_up_only_behind_a_passed_gate() -> None:
    good = section(document(result()), "CPU timings")
    assert "| 2.00 |" in good and "FAILED" not in good
    bad = document(result(gate="fail", ratio=987.0))
    assert "gate FAILED" in section(bad, "CPU timings")
    assert "987" not in bad and "6.0" not in section(bad, "Extra memory")


def test_document_shows_memory_limits_threads_and_few_rows() -> None:
    limit = Timing.of([1.0, 1.0], peak_bytes=None, error={})
    few = {"op": "linear_few_rows", "direction": "forward", "opponent": "F.linear", "config": {"weights_in_turn": 30}}
    text = document(
        result(),
        result(threads=2, ours=timing([0.5, 0.5])),
        result(opponent="three bare products", theirs=limit, ratio=0.96),
        *(result(**few, shape={"M": m, "K": 8, "N": 9}, ratio=m / 10) for m in (8, 16)),
    )
    assert "| 1 | 6 | 6.0 |" in section(text, "Extra memory")
    assert "| ours | 1050.000 | 500.000 | 2.10 |" in section(text, "Two threads over one")
    assert "| 1.042 |" in section(text, "CPU timings")
    assert "| M = 8 | M = 16 |" in section(text, "Few-row linear")
    assert "| 0.80 (" in section(text, "Few-row linear")


def test_rows_of_other_suites_become_tables_as_they_are() -> None:
    rows = [
        {"suite": "cuda", "commit": "abc", "kernel": "k", "target": "sm_90a", "registers": n, "smem": {"bytes": 8.0}}
        for n in (128, 255)
    ]
    text = section(document(cuda=rows), "CUDA sources")
    assert "Measured at commit abc." in text
    assert "In all rows: kernel k, target sm_90a, smem: bytes 8." in text
    assert "| registers |\n| ---: |\n| 128 |\n| 255 |" in text


def test_test_grid_is_told_with_its_count_its_time_and_its_errors() -> None:
    rows = [
        {"op": "bt_score", "impl": impl, "dtype": "float32", "tests": 40, "forward_error": 1e-7, "run_seconds": seconds}
        for impl, seconds in (("reference", 12.5), ("cpu", 12.5), ("triton", 30.0))
    ]
    text = section(document(kernel_grid=rows), "The test grid")
    assert "120 tests: reference and cpu in 12.5 s; triton in 30 s." in text
    assert "In all rows: op bt_score, dtype float32, tests 40, forward error 1e-07." in text


def test_a_suite_may_have_a_table_for_each_op() -> None:
    rows = [{"op": op, "kernel": kernel, "limit": None, "MB": 1.5} for op in "xy" for kernel in ("k", "all")]
    text = section(document(traffic=rows), "Traffic")
    assert text.count("In all rows: MB 1.5.") == 2 and "limit" not in text.split("### ")[1]
    assert "### x\n" in text and "### y\n" in text and text.count("| kernel |\n| --- |\n| k |\n| all |") == 2


def test_compiled_code_is_summed_up_for_each_target() -> None:
    sizes = {"op": "x", "target": "sm_90", "shared_bytes": 512}
    rows = [
        {**sizes, "impl": "liger", "spill_bytes": 8, "shared_bytes": 64},
        {**sizes, "impl": "triton", "spill_bytes": 0, "gate": "pass"},
        {**sizes, "impl": "triton", "spill_bytes": 4, "shared_bytes": 1024, "gate": "fail"},
    ]
    text = section(document(aot=rows), "Ahead-of-time compilation")
    assert "| triton | sm_90 | 2 | 1 | 1024 | 1 |\n| liger | sm_90 | 1 | 1 | 64 | - |" in text
