"""docs/measured/kernels.md says what the results say."""

from __future__ import annotations

from typing import Any

from bench import record
from bench.kernels import suite, tables
from bench.record import Result, Timing
from tests.support.bench_rows import result, timing


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
    for name in ("kernels", "kernel_grid", "aot", "traffic", "cuda", "gpu"):
        assert f"there is no `bench/results/{name}.json`" in text
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


def test_machines_of_other_instructions_stand_beside_each_other() -> None:
    text = document(
        result(machine={"isa": ["avx2"]}, ratio=2.0), result(machine={"isa": ["avx2", "avx512f"]}, ratio=3.0)
    )
    assert "| 2.00 |" in section(text, "CPU timings on AVX2") and "| 3.00 |" not in section(text, "CPU timings on AVX2")
    assert "| 3.00 |" in section(text, "CPU timings on AVX-512")


def test_a_measurement_replaces_those_of_its_own_instructions_alone() -> None:
    old, new = ({"isa": ["avx2"]}, {"isa": ["avx2", "avx512f"]})
    rows = [record.as_row(result(machine=machine, ratio=ratio)) for machine, ratio in ((old, 2.0), (new, 3.0))]
    again = record.as_row(result(machine=new, ratio=4.0))
    assert [row["ratio"] for row in record.merged(rows, [again], suite.key)] == [2.0, 4.0]


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
