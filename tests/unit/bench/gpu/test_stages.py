"""The walk of the stages on a CPU with tiny sizes, and that a wrong result fails its gate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench import record
from bench.gpu import attention, child, gradients, micro_batch, models, sampler
from bench.gpu.place import PEAKS, Place
from bench.gpu.stages import STAGES
from bench.kernels import gpu as kernels
from bench.kernels import tables

CPU = Place(torch.device("cpu"), "a CPU", 8 << 30, True)


@pytest.fixture(scope="module")
def rehearsed(module_folder: Path) -> list[dict]:
    """The rows of a whole rehearsal, which ends with 0."""
    out = module_folder / "gpu.json"
    assert command.main(["gpu", "--rehearse", "--out", str(out)]) == 0
    return record.read(out)


def of(rows: list[dict], stage: str) -> dict[str, dict]:
    return {row["case"]: row for row in rows if row["stage"] == stage and "case" in row}


def test_every_stage_leaves_the_rows_that_it_would_on_a_gpu(rehearsed: list[dict]) -> None:
    assert list(dict.fromkeys(row["stage"] for row in rehearsed)) == [n for n, s in STAGES.items() if not s.asked]
    assert all(row["suite"] == "gpu" and row["commit"] and row["machine"] for row in rehearsed)
    assert {row.get("gate", "pass") for row in rehearsed} == {"pass"}
    modes = [f"{mode}, {of}" for of in ("float32", "autocast bfloat16") for mode in ("off", "selective", "full")]
    assert list(of(rehearsed, "gradients")) == [f"{role}, {m}" for role in ("student", "discriminator") for m in modes]
    assert {"all", "synchronise", "rollout", "student"} <= of(rehearsed, "colocation").keys()
    assert [case.partition(",")[0] for case in of(rehearsed, "attention")] == ["ours", "SDPA", "FlashAttention"]
    assert list(of(rehearsed, "micro_batch")) == ["GRPO, full", "GRPO, selective", "GRPO, off", "log-probs alone"]
    for stage in ("eager", "graphs"):
        assert list(of(rehearsed, stage)) == ["engine", "sleep and wake", "4 sequences", "8 sequences"]


def test_the_rows_have_the_figures_that_were_asked_for(rehearsed: list[dict]) -> None:
    for row in of(rehearsed, "gradients").values():
        assert row["error"] < 0.05 and row["worst_error"] < 0.3
    for state, row in of(rehearsed, "colocation").items():
        assert row["bytes_per_s"] > 0 if state == "all" else row["work"] > 0 and row["ledger"] > 0
    ours = of(rehearsed, "attention")["ours, 12 + 3 x 6"]
    assert ours["error"] < 1e-5 and ours["forward_ms"] < ours["both_ms"]
    for row in of(rehearsed, "micro_batch").values():
        assert row["step_s"] > 0
    assert of(rehearsed, "micro_batch")["GRPO, off"]["planned_bytes"] > 1e6
    for stage in ("eager", "graphs"):
        rows = of(rehearsed, stage)
        assert {"wake_weights_s", "update_s", "fingerprint_s", "wake_kv_cache_s", "sleep_s"} <= rows[
            "sleep and wake"
        ].keys()
        assert rows["8 sequences"]["sequences"] == 8 and rows["8 sequences"]["tokens_per_s"] > 0
    results = [row for row in rehearsed if "op" in row]
    assert {row["opponent"] for row in results} >= {"three bare products", "naive torch"}
    assert {row["op"] for row in results} == {"linear_grpo_loss", "linear_logprob", "bt_score", "grpo_ratio_loss"}


def test_the_tables_show_what_was_found(rehearsed: list[dict]) -> None:
    text = tables.document(lambda suite: rehearsed if suite == "gpu" else [])
    assert "### gradients: gradients of a small student" in text and "tokens per s" in text
    assert "### linear_grpo_loss" in text and "### Beside the limit" in text


def test_a_missing_opponent_is_a_row_that_says_so(monkeypatch) -> None:
    monkeypatch.setattr(kernels, "installed", lambda module: module not in ("trl", "cut_cross_entropy"))
    rows = list(kernels.head(CPU))
    missing = [row for row in rows if row.get("status") == "not installed"]
    assert [row["case"] for row in missing] == [
        "head of 64 tokens beside cut-cross-entropy",
        "head of 64 tokens beside TRL",
    ]
    assert missing[1]["error"] == "there is no Python package trl" and "gate" not in missing[1]
    assert {row["op"] for row in rows if "op" in row} >= {"bt_score", "linear_logprob"}


def test_an_opponent_that_fails_costs_no_other(monkeypatch) -> None:
    def broken(problem):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(kernels.cases.head, "naive_logprob", broken)
    rows = list(kernels.head(CPU))
    (row,) = (row for row in rows if row.get("status") == "failed")
    assert row["case"] == "head of 64 tokens beside naive" and row["error"] == "no kernel image"
    assert {"bt_score", "grpo_ratio_loss"} <= {row["op"] for row in rows if "op" in row}


def test_a_wrong_gradient_fails_its_gate_by_the_parameter_that_is_off(monkeypatch) -> None:
    """As W1 was: the loss right, one projection off by 117 %."""
    right = gradients.gradients

    def wrong(role, path, made, device, mode, autocast):
        found = right(role, path, made, device, mode, autocast)
        if mode == "selective":
            name = next(name for name in found if name.endswith("0.self_attn.k_proj.weight"))
            found[name] = found[name] * 2.17
        return found

    monkeypatch.setattr(gradients, "gradients", wrong)
    found = {row["case"]: row for row in gradients.rows(CPU)}
    failing = {case for case, row in found.items() if row["gate"] == "fail"}
    assert failing == {case for case in found if "selective" in case}
    assert found["student, selective, float32"]["worst"].endswith("0.self_attn.k_proj.weight")


def test_wrong_attention_fails_its_gate(monkeypatch) -> None:
    right = attention.prefix_attention
    monkeypatch.setattr(attention, "prefix_attention", lambda *leaves: right(*leaves) * 1.1)
    gates = {row["case"].partition(",")[0]: row.get("gate") for row in attention.rows(CPU)}
    assert gates == {"ours": "fail", "SDPA": "pass", "FlashAttention": None}


def test_a_result_that_is_not_a_number_is_a_row_that_can_be_written(monkeypatch, tmp_path: Path) -> None:
    right, loss = attention.prefix_attention, kernels.cases.linear_grpo_loss
    monkeypatch.setattr(attention, "prefix_attention", lambda *given: right(*given) * torch.nan)
    monkeypatch.setattr(
        kernels.cases, "linear_grpo_loss", lambda *a, **k: (lambda made: (made[0] * torch.nan, None))(loss(*a, **k))
    )
    for stage in ("attention", "head"):
        out = tmp_path / f"{stage}.json"
        assert command.main(["gpu", "--rehearse", "--only", stage, "--out", str(out)]) == 1
        failing = [row for row in record.read(out) if row.get("gate") == "fail"]
        assert failing and all("nan" in str(row["error"]) for row in failing)


def test_a_stage_in_a_process_of_its_own() -> None:
    rows = list(child.in_child("attention", ["--rehearse"], 300.0))
    assert [row["status"] for row in rows] == ["ok", "ok", "not installed"]
    assert all(row["machine"]["cores"] for row in rows)


def test_models_get_fewer_layers_on_a_smaller_device() -> None:
    def layers(memory: float) -> int:
        most = micro_batch.SHARE * memory / micro_batch.BYTES_A_PARAMETER
        return models.fewer_layers(models.QWEN_3B, most)["num_hidden_layers"]

    assert 3.05e9 < models.parameters(models.QWEN_3B) < 3.1e9
    assert (layers(141e9), layers(80e9)) == (36, 36)
    assert 1 <= layers(16e9) < layers(24e9) < layers(40e9) < 36
    assert layers(1e9) == 1


def test_the_micro_batch_has_16384_packed_tokens() -> None:
    made = models.token_groups(1000, *micro_batch.LARGE)
    assert sum(map(micro_batch._packed, made)) == 16384


def test_vllm_is_asked_for_what_its_stage_is_about_and_is_missed_where_it_is_not(monkeypatch) -> None:
    gpu = Place(torch.device("cuda", 0), "NVIDIA H100 80GB HBM3", 80 << 30, False)
    for graphs in (True, False):
        rollout = sampler.config(300, 256, 1024, graphs, gpu).vllm
        assert (rollout.enforce_eager, rollout.max_num_seqs, rollout.dtype) == (not graphs, 1024, "bfloat16")
    monkeypatch.setattr(sampler, "installed", lambda module: False)
    (row,) = sampler.eager(gpu)
    assert row["status"] == "not installed" and row["error"] == "there is no Python package vllm"


@pytest.mark.parametrize(("name", "peak"), [("NVIDIA H200", 989e12), ("NVIDIA H100 PCIe", 756e12), ("Tesla T4", None)])
def test_the_peak_of_a_device_is_known_by_its_name(name: str, peak: float | None) -> None:
    assert Place(torch.device("cuda", 0), name, 1, False).peak_flops == peak
    assert list(PEAKS).index("GB200") < list(PEAKS).index("B200")
