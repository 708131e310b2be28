"""`eval` as a user runs it, on tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gadcore.errors import UserError
from gadcore.evaluate import sampling
from gadcore.evaluate.child import in_process
from gadcore.evaluate.command import main
from gadcore.evaluate.responses import read_responses
from gadcore.files import LOCK, held, temporary
from gadcore.measure import likeness
from gadcore.rollout.hf import HFEngine
from tests.support.builders import TEMPLATE
from tests.support.runs import ANSWERS, PROMPTS, write_rows
from tests.support.tiny import save_tiny

SETTINGS = {
    "sampling.engine": "hf",
    "data.max_prompt_tokens": 96,
    "data.max_response_tokens": 6,
    "eval.resamples": 50,
    "fresh.steps": 2,
    "fresh.batch_size": 4,
    "fresh.lr": 1e-3,
}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with the tiny models a and b, a finished run with the student b, an unfinished one, and rows."""
    monkeypatch.chdir(tmp_path)
    save_tiny(Path("a"))
    save_tiny(Path("b"), seed=1)
    save_tiny(Path("finished/student"), seed=1)
    Path("unfinished").mkdir()
    for run in ("finished", "unfinished"):
        (Path(run) / "config.toml").touch()
    write_rows(Path("rows.jsonl"))
    return tmp_path


def evaluate(models: str, out: str = "out", **more: object) -> dict:
    settings = {**SETTINGS, "eval.models": models, "eval.in_domain": "rows=rows.jsonl", "eval.out": out}
    settings["eval.out_of_domain"] = "{few = {source = 'rows.jsonl', rows = 3}}"
    settings |= {key.replace("__", "."): value for key, value in more.items()}
    assert main([f"--{key}={value}" for key, value in settings.items()]) == 0
    return json.loads((Path(out) / "evaluation.json").read_text())


def test_eval_samples_measures_and_tabulates(here: Path, capsys) -> None:
    found = evaluate("before=a,gad=finished")
    assert list(found["sets"]) == ["rows", "few"]
    assert [found["sets"][name]["prompts"] for name in ("rows", "few")] == [10, 3]
    assert [found["sets"][name]["domain"] for name in ("rows", "few")] == ["in", "out"]
    results = found["sets"]["rows"]["results"]
    assert set(results) == {"teacher", "before", "gad"}
    # Random models: their text is nothing like the teacher's, and any discriminator sees that.
    assert results["gad"]["rouge_l"]["mean"] < 0.2 and results["gad"]["fresh_accuracy"]["n"] == 10
    assert found["sets"]["few"]["differences"]["gad"]["fresh_accuracy"]["n"] == 3
    rows = read_responses(Path("out/rows/gad.jsonl"))
    assert [row.reference for row in rows[:5]] == [_cut(answer) for answer in ANSWERS]
    assert [row.prompt for row in rows[:5]] == [f"{prompt} 0" for prompt in PROMPTS]
    assert rows[3].source == "rows.jsonl:4" and rows[3].index == 3
    text = Path("out/evaluation.md").read_text()
    assert "## rows (in domain, 10 prompts" in text and "| fresh D tells apart |" in text and "gad − before" in text
    (note,) = [note for note in found["notes"] if note.startswith("few")]
    assert note.startswith("few: 2 of 3 teacher responses were cut at data.max_response_tokens: the limit is 6 tokens")
    assert "tokens in" in capsys.readouterr().out


def _cut(text: str) -> str:
    """What 6 tokens hold, end marker included."""
    return TEMPLATE.text_of(TEMPLATE.response_ids(text, finished=True, limit=6))[0]


def test_what_is_there_is_not_made_again(here: Path, monkeypatch) -> None:
    first = evaluate("before=a")
    Path("out/few/before.jsonl").unlink()
    again, made = [], sampling.make_engine

    def count(*arguments):
        again.append(arguments[1])
        return made(*arguments)

    monkeypatch.setattr(sampling, "make_engine", count)
    # Killed after the first set: only the second one is sampled, with the same result.
    assert evaluate("before=a") == first and again == ["a"]
    monkeypatch.setattr(sampling, "make_engine", lambda *_: pytest.fail("sampled again"))
    monkeypatch.setattr("gadcore.evaluate.fresh_text.fresh_discriminator", lambda *_: pytest.fail("trained again"))
    assert evaluate("before=a") == first


def test_several_responses_to_a_prompt_are_averaged_and_drawn_once(here: Path) -> None:
    """Stopped between the responses of a prompt: all of that prompt's are drawn again, and of no other."""
    found = evaluate("a=a,b=b", out="whole", eval__samples=3)
    rows = read_responses(Path("whole/rows/b.jsonl"))
    assert [(row.index, row.sample) for row in rows] == [(i, k) for i in range(10) for k in range(3)]
    assert len({row.response for row in rows}) > 10
    results, differences = found["sets"]["rows"]["results"], found["sets"]["rows"]["differences"]
    words = [len(likeness.words(row.response)) for row in rows]
    assert results["b"]["words"]["mean"] == pytest.approx(sum(words) / 30) and results["b"]["words"]["n"] == 10
    assert differences["b"]["style"]["n"] == results["b"]["fresh_accuracy"]["n"] == 10
    assert results["teacher"]["style"]["n"] == results["teacher"]["distinct_2"]["n"] == 10
    Path("out/rows").mkdir(parents=True)
    lines = [json.dumps({"made_from": json.loads(Path("whole/rows/sampled-b.json").read_text())["made_from"]})]
    for row in rows[:5]:
        made = {"place": row.index, "text": "kept", "finished": row.finished, "tokens": 1, "seconds": 0.5}
        lines.append(json.dumps(made))
    Path("out/rows/drawn-b.part").write_text("\n".join(lines) + "\n")
    evaluate("a=a,b=b", eval__samples=3, fresh__enabled="false")
    again = read_responses(Path("out/rows/b.jsonl"))
    assert [row.response for row in again[:3]] == ["kept"] * 3 and again[3:] == rows[3:]
    with pytest.raises(UserError, match="was made with other samples"):
        evaluate("a=a", out="whole")


def test_what_was_drawn_when_it_was_stopped_is_not_drawn_again(here: Path, monkeypatch) -> None:
    """A kill in the midst of a set, and of the line of a response."""
    whole, draw = evaluate("a=a", out="whole"), HFEngine._one
    calls = 0

    def stopped(*arguments: object) -> list:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return draw(*arguments)

    monkeypatch.setattr(HFEngine, "_one", stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluate("a=a")
    part = here / "out/rows/drawn-a.part"
    assert part.read_text().count("\n") == 1 + 4 and not (here / "out/rows/a.jsonl").exists()
    part.write_text(part.read_text()[:-10])
    with pytest.raises(UserError, match="drawn-a.part was made with other seed"):
        evaluate("a=a", run__seed=1)
    calls = 100
    assert evaluate("a=a")["sets"] == whole["sets"]
    # 10 and 3 rows, of which three were whole.
    assert calls == 100 + 7 + 3 and not part.exists()
    assert (here / "out/rows/a.jsonl").read_bytes() == (here / "whole/rows/a.jsonl").read_bytes()


def test_a_folder_takes_one_eval_at_a_time(here: Path) -> None:
    with held(Path("out") / LOCK, "x"), pytest.raises(UserError, match="the folder out is in use by process"):
        evaluate("a=a")
    # Of a killed process, and of somebody else.
    left = temporary(Path("out/x"))
    left.touch()
    Path("out/.model-a").mkdir()
    evaluate("a=a")
    assert not left.exists() and Path("out/.model-a").exists()


def test_equal_models_give_equal_responses_and_another_seed_others(here: Path) -> None:
    found = evaluate("b=b,run=finished")
    texts = {name: Path(f"out/rows/{name}.jsonl").read_text() for name in ("b", "run")}
    assert texts["b"] == texts["run"]
    assert all(d["mean"] == 0 for d in found["sets"]["rows"]["differences"]["run"].values())
    evaluate("b=b", out="other", run__seed=1)
    assert Path("other/rows/b.jsonl").read_text() != texts["b"]


def test_models_share_an_engine_where_their_shape_is_one(here: Path, monkeypatch) -> None:
    """The weights of the second model must be the ones that are sampled from."""
    save_tiny(Path("q"), "qwen2", seed=1)
    started, make = [], sampling.make_engine

    def count(*arguments):
        started.append(arguments[1])
        return make(*arguments)

    monkeypatch.setattr(sampling, "make_engine", count)
    evaluate("a=a,b=b,q=q", fresh__enabled="false")
    assert started == ["a", "q"]
    evaluate("b=b", out="alone", fresh__enabled="false")
    assert Path("out/rows/b.jsonl").read_text() == Path("alone/rows/b.jsonl").read_text()
    assert Path("out/rows/b.jsonl").read_text() != Path("out/rows/a.jsonl").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampling__temperature": 0.5}, "before.jsonl was made with other temperature: choose another eval.out"),
        ({"data__max_response_tokens": 5}, "other max_response_tokens"),
        ({"eval__rows": 5}, "other rows"),
        ({"eval__models": "before=b"}, "other weights"),
    ],
)
def test_responses_made_otherwise_are_not_mixed_in(here: Path, change: dict, message: str) -> None:
    evaluate("before=a", fresh__enabled="false")
    with pytest.raises(UserError, match=message):
        evaluate("before=a", fresh__enabled="false", **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eval__models": "gad=unfinished"}, "the run unfinished has no student yet"),
        ({"eval__models": "gad=nowhere"}, "no model 'nowhere'"),
        ({"eval__in_domain": "rows=nowhere.jsonl"}, "set rows: the data file nowhere.jsonl does not exist"),
        ({"eval__rows": 1}, "one prompt, which cannot be cut into halves"),
        ({"data__max_prompt_tokens": 1000}, "the model a has 256: lower data.max_prompt_tokens"),
        ({"run__device": "tpu"}, "run.device = 'tpu'"),
        ({"fresh__model": "nowhere"}, "no model 'nowhere'"),
    ],
)
def test_bad_input_is_named(here: Path, change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate("before=a", **change)


def test_nothing_to_evaluate_is_said() -> None:
    with pytest.raises(UserError, match=r"no model to evaluate: give eval.models"):
        main([])
    with pytest.raises(UserError, match=r"no prompts to evaluate on"):
        main(["--eval.models", "a=a"])


def test_what_must_be_set_before_torch_is_set_with_the_settings_at_hand(here: Path) -> None:
    seen = []

    def prepare(config):
        seen.append((config.run.threads, Path("out").exists()))

    arguments = {**SETTINGS, "eval.models": "b=b", "eval.in_domain": "rows=rows.jsonl", "eval.out": "out"}
    assert main([f"--{k}={v}" for k, v in {**arguments, "run.threads": 3}.items()], prepare) == 0
    assert seen == [(3, False)]


def test_responses_of_another_system_are_measured(here: Path) -> None:
    evaluate("before=a", fresh__enabled="false")
    for name in ("rows", "few"):
        rows = [json.loads(line) for line in Path(f"out/{name}/before.jsonl").read_text().splitlines()]
        lines = [json.dumps({**row, "response": row["reference"]}) for row in rows]
        Path(f"out/{name}/copied.jsonl").write_text("\n".join(lines) + "\n")
    found = evaluate("before=a,copied=a", fresh__enabled="false")
    assert found["sets"]["rows"]["results"]["copied"]["rouge_l"]["mean"] == 1


def test_equal_text_that_ends_alike_cannot_be_told_apart_and_its_end_can(here: Path) -> None:
    """The end marker comes from `finished` on both sides alike: it tells nothing where both ended by themselves."""
    evaluate("before=a", fresh__enabled="false", data__max_response_tokens=64)
    rows = [json.loads(line) for line in Path("out/rows/before.jsonl").read_text().splitlines()]
    for name, finished in (("same", True), ("cut", False)):
        lines = [json.dumps({**row, "response": row["reference"], "finished": finished}) for row in rows]
        for folder in ("same_end", "cut_end"):
            Path(f"{folder}/rows").mkdir(parents=True, exist_ok=True)
        Path(f"{name}_end/rows/m.jsonl").write_text("\n".join(lines) + "\n")
    accuracies = {}
    for name in ("same", "cut"):
        found = evaluate("m=a", out=f"{name}_end", eval__out_of_domain="{}", fresh__steps=20, fresh__lr=1e-2)
        accuracies[name] = found["sets"]["rows"]["results"]["m"]["fresh_accuracy"]["mean"]
    assert accuracies == {"same": 0.5, "cut": 1.0}


def test_an_engine_that_is_one_a_process_gets_a_process_for_each_shape(here: Path, monkeypatch) -> None:
    """As vLLM is on CUDA: a and b share one, q has its own."""
    save_tiny(Path("q"), "qwen2", seed=1)
    greedy = {"sampling__temperature": 0, "fresh__enabled": "false"}
    evaluate("a=a,q=q,b=b", out="together", **greedy)
    started = []

    def counted(function, *arguments):
        started.append(function)
        return in_process(function, *arguments)

    monkeypatch.setattr(HFEngine, "one_a_process", classmethod(lambda cls, device: True))
    monkeypatch.setattr(sampling, "in_process", counted)
    for _ in range(2):
        evaluate("a=a,b=b,q=q", out="apart", **greedy)
    assert len(started) == 2, "and none where nothing is missing"
    for name in "abq":
        texts = [Path(f"{out}/rows/{name}.jsonl").read_text() for out in ("together", "apart")]
        assert texts[0] == texts[1]


@pytest.mark.slow
def test_vllm_samples_from_each_models_own_weights(here: Path) -> None:
    """Three models through one process: an engine that is handed new weights, and a second engine of another shape."""
    pytest.importorskip("vllm")
    save_tiny(Path("q"), "qwen2", seed=1)
    greedy = {"sampling__temperature": 0, "fresh__enabled": "false"}
    evaluate("a=a,b=b,q=q", out="vllm", sampling__engine="vllm", **greedy)
    evaluate("a=a,b=b,q=q", out="hf", **greedy)
    for name in "abq":
        texts = [[r.response for r in read_responses(Path(f"{e}/rows/{name}.jsonl"))] for e in ("vllm", "hf")]
        assert texts[0] == texts[1]
