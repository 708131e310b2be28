"""A discriminator's directory as a classifier of vLLM: the scores are D's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gadcore import Discriminator
from tests.support.service_client import group
from tests.support.tiny import save_tiny
from tests.support.vllm_server import ENVIRONMENT

CLASSIFY = """
import json, sys
from vllm import LLM, PoolingParams, TokensPrompt

if __name__ == "__main__":
    llm = LLM(sys.argv[1], runner="pooling", dtype="float32", enforce_eager=True, max_model_len=256, block_size=32,
              max_num_seqs=8)
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in json.loads(sys.argv[2])]
    found = llm.classify(prompts, pooling_params=PoolingParams(use_activation=False), use_tqdm=False)
    print("SCORES", json.dumps([each.outputs.probs[0] for each in found]))
"""


@pytest.mark.by_hand
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_vllm_gives_the_same_scores(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    made = Discriminator.load(str(save_tiny(tmp_path / "base", kind)), device="cpu", seed=1)
    texts = [group(str(k)) for k in range(4)]
    made.update([made.group(g.prompt, g.teacher_response, g.samples, g.finished) for g in texts], lr=1e-2)
    made.save(tmp_path / "d")
    groups = [made.group(g.prompt, g.teacher_response, g.samples, g.finished) for g in texts]
    scores = made.score(groups)
    ids = [[*g.prompt.token_ids, *s.token_ids] for g in groups for s in (g.teacher, *g.samples)]
    (tmp_path / "classify.py").write_text(CLASSIFY)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "classify.py"), str(tmp_path / "d"), json.dumps(ids)],
        env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("SCORES")]
    assert json.loads(line.removeprefix("SCORES ")) == pytest.approx(scores.vector(), rel=1e-3, abs=1e-3)
    assert max(scores.vector()) - min(scores.vector()) > 0.1
