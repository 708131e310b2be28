"""Settings of eval, and responses on disk."""

from __future__ import annotations

import json

import pytest

from gadcore.config import loading
from gadcore.config.rollout import HFRollout
from gadcore.errors import UserError
from gadcore.evaluate.responses import ResponseRow, digest_of, read_responses, write_responses
from gadcore.evaluate.settings import EvalConfig
from gadcore.record.reading import read_json

ROW = {
    "prompt": "Name a city.",
    "messages": [{"role": "user", "content": "Name a city."}],
    "reference": "Paris.",
    "response": "Rome\u2028and more\u0085",
    "finished": True,
    "source": "rows.jsonl:1",
}


def test_responses_come_back_as_they_were_written(tmp_path) -> None:
    row = ResponseRow(**{**ROW, "messages": tuple(ROW["messages"])}, reference_finished=False, index=7)
    path = tmp_path / "set" / "model.jsonl"
    write_responses(path, [row, row])
    assert read_responses(path) == [row, row]
    assert [p.name for p in path.parent.iterdir()] == ["model.jsonl"]


def test_files_of_other_systems_may_leave_two_columns_out(tmp_path) -> None:
    path = tmp_path / "model.jsonl"
    path.write_text("".join(json.dumps({**ROW, "more": 1}, ensure_ascii=False) + "\n" for _ in range(2)))
    rows = read_responses(path)
    assert [row.index for row in rows] == [0, 1] and all(row.reference_finished for row in rows)
    assert rows[0].response == ROW["response"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "model.jsonl:2: broken JSON"),
        ("", "model.jsonl:2: broken JSON"),
        ("[]", "model.jsonl:2: expected an object"),
        (json.dumps({**ROW, "finished": 1}), "model.jsonl:2: finished missing or not"),
        (json.dumps({**ROW, "index": "1"}), "model.jsonl:2: index missing or not"),
        (json.dumps({**ROW, "response": "\ud800"}), "model.jsonl:2: response missing or not"),
        (json.dumps({**ROW, "messages": [{"role": "user"}]}), "model.jsonl:2: messages missing or not"),
        (json.dumps({k: v for k, v in ROW.items() if k != "reference"}), "model.jsonl:2: reference missing or not"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line: str, message: str) -> None:
    path = tmp_path / "model.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + line + "\n")
    with pytest.raises(UserError, match=message):
        read_responses(path)


def test_files_that_are_missing_empty_or_no_json_are_named(tmp_path) -> None:
    with pytest.raises(UserError, match="nothing.jsonl does not exist"):
        read_responses(tmp_path / "nothing.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match="empty.jsonl:1: broken JSON"):
        read_responses(tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b"\xe9\n")
    with pytest.raises(UserError, match="latin.jsonl is not UTF-8"):
        read_responses(tmp_path / "latin.jsonl")
    for name, text in (("torn.json", '{"a'), ("list.json", "[]")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=name):
            read_json(tmp_path / name)


def test_a_digest_stays_what_folders_hold() -> None:
    assert digest_of([("ä", True)]) == "e91d42581710d8e42c8d7a0bf26b85d2"


def test_models_and_sets_from_the_command_line_and_from_a_file_are_the_same(tmp_path) -> None:
    line = ["--eval.models", "before=tiny, gad=runs/x", "--eval.in_domain", "test=a.jsonl"]
    line += ["--eval.out_of_domain", '{dolly = {source = "o/dolly", rows = 500, columns = {prompt = "instruction"}}}']
    (tmp_path / "eval.toml").write_text(
        """
        [eval]
        models = {before = "tiny", gad = "runs/x"}
        in_domain = {test = "a.jsonl"}
        [eval.out_of_domain.dolly]
        source = "o/dolly"
        rows = 500
        columns = {prompt = "instruction"}
        """
    )
    config = loading.load(line, EvalConfig)
    assert config == loading.load(["--config", str(tmp_path / "eval.toml")], EvalConfig)
    assert config.eval.models == {"before": "tiny", "gad": "runs/x"}
    assert config.eval.in_domain["test"].source == "a.jsonl" and config.eval.out_of_domain["dolly"].rows == 500


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--eval.models=a", "NAME=VALUE"),
        ("--eval.models=a=x,a=y", "a name twice"),
        ("--eval.models=../a=x", "'../a' is no name"),
        ("--eval.models=teacher=x", "must not use the name teacher"),
        ("--eval.models=judge-a=x", "must not use the name judge-a"),
        ("--eval.in_domain={a = {source = 'x', row = 1}}", "eval.in_domain"),
        ("--eval.in_domain=3", "eval.in_domain"),
        ("--sampling.temperature=-1", "sampling.temperature"),
        ("--fresh.steps=0", "fresh.steps"),
        ("--fresh.step=3", "did you mean fresh.steps"),
    ],
)
def test_a_bad_setting_is_named(argument: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        loading.load([argument], EvalConfig)


def test_one_name_for_two_sets_is_refused() -> None:
    with pytest.raises(UserError, match="share the name a"):
        loading.load(["--eval.in_domain=a=x", "--eval.out_of_domain=a=y"], EvalConfig)


def test_a_training_run_gets_the_same_limits_and_engine() -> None:
    line = ["--data.max_response_tokens", "77", "--data.long_prompt", "error", "--sampling.dtype", "bfloat16"]
    config = loading.load([*line, "--run.seed", "5", "--sampling.kv_cache_gib", "3"], EvalConfig).as_run()
    assert (config.data.max_response_tokens, config.data.long_prompt) == (77, "error")
    assert (config.vllm.dtype, config.vllm.kv_cache_gib, config.run.seed) == ("bfloat16", 3, 5)
    assert loading.load(["--sampling.engine", "hf"], EvalConfig).as_run().rollout == HFRollout()
    with pytest.raises(UserError, match='sampling.kv_cache_gib is a setting of sampling.engine = "vllm"'):
        loading.load(["--sampling.engine", "hf", "--sampling.kv_cache_gib", "3"], EvalConfig)


@pytest.mark.parametrize(
    ("line", "device", "key"),
    [
        (["--sampling.kv_cache_gib", "3"], "cuda", "sampling.kv_cache_gib"),
        (["--sampling.gpu_memory_utilization", "0.3"], "cpu", "sampling.gpu_memory_utilization"),
        (["--fresh.enabled", "false", "--fresh.steps", "3"], "cpu", "fresh.steps"),
        (["--eval.rows", "3", "--eval.in_domain", '{a = {source = "x", rows = 2}}'], "cpu", "eval.rows"),
    ],
)
def test_settings_that_change_nothing_are_told(line: list[str], device: str, key: str) -> None:
    (sentence,) = loading.load(line, EvalConfig).without_effect(device)
    assert sentence.startswith(f"{key} has no effect: ")


def test_settings_that_change_something_are_not_told() -> None:
    for line in (
        ["--sampling.kv_cache_gib", "3"],
        ["--fresh.steps", "3"],
        ["--eval.rows", "3", "--eval.in_domain=a=x"],
    ):
        assert loading.load(line, EvalConfig).without_effect("cpu") == []
