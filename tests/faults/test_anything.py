"""Whatever a server says and whatever became of a file: the right result, or one sentence and no traceback."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gadcore.evaluate.human import make_sheet
from gadcore.evaluate.responses import write_json
from gadcore.run import main
from gadcore.teacher.reply import Reply, Unusable, refused
from gadcore.teacher.secret import Secret
from gadcore.teacher.store import ChatRequest, ReplyStore, Spent
from tests.support import judging
from tests.support.damage import odd_bytes, odd_json, thorough
from tests.support.openai_server import completion
from tests.support.report_runs import answers, folder, metrics

KEY = "sk-0123456789abcdefghijklmnopqrstuvwxyz"
REQUEST = ChatRequest(({"role": "user", "content": "Hello"},), {"max_completion_tokens": 16})
BODY = completion(f"A text with {KEY}.") | {"error": None, "extra": [{"deep": {"er": [1, 2]}}]}
PARTS = completion([{"type": "text", "text": "One."}, {"type": "refusal", "refusal": "No."}], refusal=None)


def told(code: int, out: str, err: str) -> None:
    """The single oracle: a result, or exit code 2 and one sentence."""
    assert code in (0, 1, 2)
    if code == 2:
        assert err.startswith("gadcore: ") and err.count("\n") == 1 and len(err) < 2000, err
    assert "Traceback" not in err
    for text in (out, err):
        assert not any(ord(c) < 32 and c not in "\n" for c in text) and "\u202e" not in text


def command(*arguments: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return code, out.getvalue(), err.getvalue()


def read(body: bytes, status: int = 200) -> None:
    try:
        if status != 200:
            raise refused(status, body, Secret(KEY))
        reply = Reply.parse(body, Secret(KEY))
    except Unusable as error:
        assert str(error) and len(str(error)) < 400 and "\n" not in str(error) and KEY not in str(error)
        assert str(error).isprintable() or not any(ord(c) < 32 for c in str(error))
        spent = Spent.of(REQUEST, error.usage)
    else:
        # It can be written, read back, and counted.
        with tempfile.TemporaryDirectory() as where:
            path = Path(where) / "replies.jsonl"
            with ReplyStore(path, "http://x") as store:
                store.add(REQUEST, "m", reply, Spent.of(REQUEST, reply.usage, reply.text), 0.1)
            assert KEY not in path.read_text()
            with ReplyStore(path, "http://x") as store:
                assert store.get(store.key(REQUEST, "m")) == reply
        spent = Spent.of(REQUEST, reply.usage, reply.text)
        assert reply.outcome and len(reply.told) < 20
    assert spent.requests == 1 and 0 <= spent.tokens <= 3 * 10**9


@thorough
@given(st.one_of(odd_json(BODY), odd_json(PARTS)), st.sampled_from([200, 200, 400, 401, 429, 500]))
def test_any_value_in_a_reply(body: str, status: int) -> None:
    read(body.encode("utf-8", "surrogatepass"), status)


@thorough
@given(st.one_of(odd_bytes(json.dumps(BODY).encode()), st.binary(max_size=200)), st.sampled_from([200, 404]))
def test_any_bytes_in_a_reply(body: bytes, status: int) -> None:
    read(body, status)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run folder with every file that a report reads."""
    path = tmp_path_factory.mktemp("runs") / "run"
    more = {"memory/rollout_held": 2.0**30, "memory/rollout_peak": 2.0**30, "sampler/logprob_diff_max": 1e-3}
    rows = answers(0.2, 4, finished=True)
    folder(path, metrics(2, 3, **more), {"before": rows, "after_gad": answers(0.4, 4, finished=True)})
    summary = json.loads((path / "summary.json").read_text())
    summary |= {
        "started": "2026-01-01 10:00", "finished": "2026-01-01 11:00", "steps": {"warmup": 2, "gad": 3},
        "tokens": {"sampled": 10, "trained": 20}, "machine": {"cpu": "x", "threads": 2, "device": "cpu", "torch": "2"},
        "memory": {"states": {"rollout": {"student.parameters": 10**9}}, "limit_bytes": 2 * 10**9, "process_bytes": 1},
        "gate": {"measured": [[2, 0.7], [3, 0.8]], "extra": 1},
        "convergence": {"measured": [[3, 0.7, 0.6, 0.8]], "stopped": "plateau"},
    }  # fmt: skip
    summary["evaluations"]["before"]["ngram_f1"] = {"1": 0.2}
    (path / "summary.json").write_text(json.dumps(summary))
    sample = {
        "stage": "gad",
        "step": 3,
        "prompt": "p",
        "teacher": "t",
        "student": "s",
        "reward": 0.1,
        "teacher_score": 0.2,
    }
    (path / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    with (path / "config.toml").open("a") as file:
        file.write('[data]\ntrain = "rows.jsonl"\n[gate]\nenabled = true\nlow = 0.6\nhigh = 0.9\n')
    figure = {"mean": 0.25, "interval": [0.2, 0.3]}
    results = {"teacher": {"words": figure}, "a": {"rouge_l": figure}, "b": {"rouge_l": figure}}
    found = {"domain": "in", "prompts": 8, "source": "x", "differences": {"b": {"rouge_l": figure}}, "results": results}
    write_json(path / "eval/evaluation.json", {"models": {"a": "m", "b": "n"}, "sets": {"s": found}, "notes": ["one"]})
    assert command("report", path)[0] == 0
    return path


FILES = (
    "summary.json",
    "metrics.jsonl",
    "samples.jsonl",
    "evaluations/after_gad.jsonl",
    "eval/evaluation.json",
    "config.toml",
)


def report_of(run: Path, name: str, content: bytes) -> None:
    copy = run.parent / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run, copy)
    (copy / "report.html").unlink()
    (copy / name).write_bytes(content)
    code, out, err = command("report", copy)
    told(code, out, err)
    assert (copy / "report.html").exists() == (code == 0)


@thorough
@given(data=st.data(), name=st.sampled_from(FILES[:-1]))
def test_any_value_in_a_file_of_a_run(data: st.DataObject, name: str, run: Path) -> None:
    text = (run / name).read_text()
    if name.endswith(".json"):
        content = data.draw(odd_json(json.loads(text)))
    else:
        lines = text.splitlines()
        at = data.draw(st.integers(0, len(lines) - 1))
        lines[at] = data.draw(odd_json(json.loads(lines[at])))
        content = "\n".join(lines) + "\n"
    report_of(run, name, content.encode("utf-8", "surrogatepass"))


@thorough
@given(data=st.data(), name=st.sampled_from(FILES))
def test_any_damage_to_a_file_of_a_run(data: st.DataObject, name: str, run: Path) -> None:
    report_of(run, name, data.draw(odd_bytes((run / name).read_bytes())))


@thorough
@given(data=st.data(), name=st.sampled_from(["key.json", "ada.json"]))
def test_any_value_in_a_tally(data: st.DataObject, name: str, tmp_path: Path) -> None:
    sheet = make_sheet(
        ("a", judging.rows(["x", "y"])), ("b", judging.rows(["z", "w"])), set_name="s", title="t", seed=0
    )
    rows = [{"pair": pair, "choice": "left", "seconds": 3.0} for pair in sheet.key["pairs"]]
    files = {
        "key.json": sheet.key,
        "ada.json": {"sheet": sheet.key["sheet"], "rater": "Ada", "pairs": 2, "answers": rows},
    }
    for file, value in files.items():
        text = data.draw(odd_json(value)) if file == name else json.dumps(value)
        (tmp_path / file).write_bytes(text.encode("utf-8", "surrogatepass"))
    told(*command("tally", tmp_path / "key.json", tmp_path / "ada.json"))


@thorough
@given(data=st.data())
def test_any_value_in_stored_replies_and_responses(data: st.DataObject, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "held", ignore_errors=True)
    (tmp_path / "judgements.jsonl").unlink(missing_ok=True)
    judging.folder(tmp_path, gad=judging.rows(["x", "y"]))
    with ReplyStore(tmp_path / "judgements.jsonl", "http://127.0.0.1:9/v1") as store:
        store.add(REQUEST, "judge", Reply("8 6", "stop", usage={"prompt_tokens": 3}), Spent(1, 2, 3), 0.1)
        store.add_failure(REQUEST, "judge", "why", Spent())
    path = tmp_path / data.draw(st.sampled_from(["judgements.jsonl", "held/gad.jsonl"]))
    lines = path.read_text().splitlines()
    at = data.draw(st.integers(0, 1))
    lines[at] = data.draw(odd_json(json.loads(lines[at])))
    path.write_bytes(("\n".join(lines) + "\n").encode("utf-8", "surrogatepass"))
    # A budget of one answer, which the store has had: nothing is asked.
    argv = judging.arguments("judge", tmp_path, "http://127.0.0.1:9/v1", budget__requests=1)
    told(*command("judge", *argv))
