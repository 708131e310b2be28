"""GADServiceReward: the service as a reward of TRL's asynchronous trainer."""

from __future__ import annotations

import asyncio
import pickle
from pathlib import Path
from typing import Any

import pytest
from trl import GRPOTrainer

from gadcore.errors import UserError
from gadcore.integrations.trl import GADServiceReward
from tests.support.score_server import score_server
from tests.support.tiny import tiny_tokenizer
from tests.support.trl_trainers import ROWS, make, replayed


def test_a_group_is_scored_in_a_process_that_only_has_a_copy_of_it() -> None:
    from accelerate import PartialState
    from trl.experimental.async_grpo.async_rollout_worker import RolloutGroup, _AsyncRolloutLoop

    # TRL's logger asks for it.
    PartialState()
    tokenizer = tiny_tokenizer()
    ids = [tokenizer(text).input_ids for text in ("Paris", "a city")]
    with score_server() as (url, asked):
        reward = pickle.loads(pickle.dumps(GADServiceReward(tokenizer, url=url)))
        group = RolloutGroup(
            prompts=[ROWS[0]["prompt"]] * 2,
            reward_kwargs={"teacher_response": [ROWS[0]["teacher_response"]] * 2},
            completions=[[{"role": "assistant", "content": "?"}]] * 2,
            completions_ids=[[*ids[0], 2], ids[1]],
            completions_sequences=[[], []],
            tool_call_counts=[0, 0],
            tool_failure_counts=[0, 0],
            model_version=0,
            group_id=0,
            env_rewards=[],
            rollout_rewards=[],
        )
        scored: list[Any] = []
        loop = _AsyncRolloutLoop.__new__(_AsyncRolloutLoop)
        loop.reward_funcs, loop.reward_func_names = [_kept(reward, scored)], ["discriminator"]
        loop._env_reward_types = []
        asyncio.run(loop._score_group(group))
    assert scored == [[5.0, 6.0]]
    ((path, body),) = asked
    assert path == "/v1/score_and_update"
    (sent,) = body["groups"]
    assert sent["samples"] == ["Paris", "a city"] and sent["finished"] == [True, False]
    assert sent["messages"] == ROWS[0]["prompt"] and sent["teacher_response"] == ROWS[0]["teacher_response"]


def _kept(reward: GADServiceReward, into: list[Any]) -> Any:
    def call(**columns: Any) -> list[float]:
        into.append(reward(**columns))
        return list(into[-1])

    return call


def test_the_synchronous_trainer_may_only_score(tmp_path_factory: pytest.TempPathFactory) -> None:
    from tests.support.tiny import save_tiny

    folder = tmp_path_factory.mktemp("remote")
    model = save_tiny(folder / "model")
    with score_server() as (url, asked):
        reward = GADServiceReward(tiny_tokenizer(), url=url)
        with pytest.raises(UserError, match="GADReward"):
            make(GRPOTrainer, model, folder, reward_funcs=[reward], rollout_func=replayed).train()
        reward = GADServiceReward(tiny_tokenizer(), url=url, trains=False)
        make(GRPOTrainer, model, folder, reward_funcs=[reward], rollout_func=replayed, max_steps=1).train()
    assert {path for path, _ in asked} == {"/v1/score"}


def test_an_address_that_is_none_is_told_at_once() -> None:
    with pytest.raises(UserError, match="no address"):
        GADServiceReward(tiny_tokenizer(), url="nowhere")


def test_the_examples_first_line_is_true(tmp_path: Path) -> None:
    """examples/trl_gad.py, run as it says, on a tiny model."""
    import json
    import re
    import runpy
    import sys

    from tests.support.runs import ROOT
    from tests.support.tiny import save_tiny

    path = ROOT / "examples" / "trl_gad.py"
    source = path.read_text()
    assert "python examples/trl_gad.py MODEL ROWS.jsonl" in source.splitlines()[0]
    small = re.sub(r"max_steps=8", "max_steps=2", source).replace("max_completion_length=64", "max_completion_length=6")
    (tmp_path / "trl_gad.py").write_text(small)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row | {"prompt": row["prompt"][0]["content"]}) + "\n" for row in ROWS))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setattr(sys, "argv", ["trl_gad.py", str(save_tiny(tmp_path / "model")), str(rows)])
        runpy.run_path("trl_gad.py", run_name="__main__")
    for name in ("student", "discriminator"):
        assert (tmp_path / "runs/trl" / name / "model.safetensors").exists()
