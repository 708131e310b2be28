"""The policy on reasoning: what each side shows of it, what the loss covers, and what contradicts what."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gadcore.config.data import DataSettings
from gadcore.config.loading import load
from gadcore.data.batches import build_prompts
from gadcore.data.forms import RawRow
from gadcore.data.groups import Group, Prompt, Response
from gadcore.data.reasoning import answer_of, check, header_of, of_student
from gadcore.data.template import ChatTemplate
from gadcore.errors import UserError
from gadcore.rollout.answers import AnswerSampler
from gadcore.train.inputs import read_inputs
from tests.support.tiny import CHATML, save_tiny, tiny_tokenizer

OPENING = CHATML.replace("'<|im_start|>' + m['role'] + '\n'", "'<|im_start|>' + m['role'] + '\n<think>\n'").replace(
    "assistant\n", "assistant\n<think>\n"
)
CLOSED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think></think>' }}{% endif %}"
)


def template(source: str = CHATML, *, known: bool = False) -> ChatTemplate:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = source
    if known:
        tokenizer.add_tokens(["<think>", "</think>"])
    return ChatTemplate(tokenizer)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("An answer.", "An answer."),
        ("  An answer.", "  An answer."),
        ("<think>a\nb</think>\n\nAn answer.", "An answer."),
        ("<think></think>An answer.", "An answer."),
        ("One. <think>a</think>Two. <think>b</think>Three.", "One. Two. Three."),
        ("a\nb</think>\nAn answer.", "An answer."),
        ("a</think>One. <think>b</think>Two.", "One. Two."),
        ("<think>cut off in the mid", ""),
        ("One. <think>cut off", "One. "),
        ("<think>a<think>b</think>Two.", "Two."),
    ],
)
def test_an_answer_is_what_is_left_without_reasoning(text: str, answer: str) -> None:
    assert answer_of(text) == answer


def rows(*texts: str) -> list[RawRow]:
    return [RawRow(({"role": "user", "content": "Why?"},), text, f"rows:{i}") for i, text in enumerate(texts, 1)]


def test_the_teachers_text_under_each_policy() -> None:
    made, texts = template(), rows("<think>hm</think>Yes.", "No.")
    kept, report = build_prompts(texts, made, DataSettings())
    assert [group.teacher.text for group in kept] == ["<think>hm</think>Yes.", "No."] and report.reasoned == 1
    assert report.sentences() == ["1 of 2 teacher responses have a block of reasoning (data.reasoning)"]
    stripped, report = build_prompts(texts, made, DataSettings(reasoning="strip"))
    assert [group.teacher.text for group in stripped] == ["Yes.", "No."] and report.reasoned == 1
    # What cross-entropy is made of, and what D gets, is the answer alone.
    assert stripped[0].teacher.token_ids == made.response_ids("Yes.", finished=True)
    with pytest.raises(UserError, match=r"rows:1: the teacher's response has a block of reasoning \(<think>\)"):
        build_prompts(texts, made, DataSettings(reasoning="error"))
    with pytest.raises(UserError, match="rows:1: the teacher's response is nothing but reasoning"):
        build_prompts(rows("<think>hm</think> "), made, DataSettings(reasoning="strip"))


class Drawing:
    """An engine that gives fixed texts."""

    def __init__(self, made: ChatTemplate, texts: list[str]) -> None:
        self.texts, self.template = texts, made

    def generate(self, requests, **more):
        drawn = [(text, self.template.response_ids(text, finished=True)) for text in self.texts]
        return [[Response(text, ids, True, (0.0,) * len(ids)) for text, ids in drawn] for _ in requests]

    def wake(self, part) -> None: ...
    def sleep(self) -> None: ...
    def update_weights(self, source) -> None: ...


def test_a_samples_tokens_are_the_losses_and_its_text_is_ds() -> None:
    made = template()
    prompt = Prompt(7, ({"role": "user", "content": "Why?"},), (1, 2))
    for policy, texts in (("keep", ["<think>hm</think>Yes.", "No."]), ("strip", ["Yes.", "No."])):
        group = Group(prompt, Response("t", (1,), True))
        sampler = AnswerSampler(Drawing(made, ["<think>hm</think>Yes.", "No."]), [], temperature=1.0, max_tokens=99,
                                reasoning=policy)  # fmt: skip
        sampler.draw([group], 2, "test")
        assert [sample.text for sample in group.samples] == texts
        whole = made.response_ids("<think>hm</think>Yes.", finished=True)
        assert group.samples[0].token_ids == whole
        assert group.samples[0].finished and group.samples[0].logprobs == (0.0,) * len(whole)
    sampler.reasoning = "error"
    with pytest.raises(UserError, match=r"for the prompt of row 7 \(from 0\) has a block of reasoning"):
        sampler.draw([group], 2, "test")


def test_a_sample_that_is_cut_inside_its_reasoning_has_no_answer() -> None:
    cut = Response("<think>hm, hm", (1, 2, 3), False, (0.0,) * 3)
    assert of_student(cut, "strip", "x") == Response("", (1, 2, 3), False, (0.0,) * 3)


def test_what_prompts_end_in() -> None:
    assert header_of(template()) == "none" and header_of(template(CLOSED)) == "closed"
    assert header_of(template(OPENING)) == "open"


@pytest.mark.parametrize(
    ("policy", "source", "reasoned", "sentence"),
    [
        ("keep", OPENING, 3, "1 of 4 teacher responses never close one"),
        ("strip", OPENING, 4, 'data.reasoning = "strip" teaches responses without one'),
        ("error", OPENING, 0, 'data.reasoning = "error" teaches responses without one'),
        ("keep", CLOSED, 2, "and 2 of 4 teacher responses hold one of their own"),
    ],
)
def test_what_contradicts_itself_is_refused(policy, source, reasoned, sentence) -> None:
    with pytest.raises(UserError, match=r"prompts end in an? (open|closed) block of reasoning") as caught:
        check(policy, template(source), reasoned, 4)
    assert sentence in str(caught.value) and "data.template_arguments" in str(caught.value)


def test_what_fits_is_told_at_most() -> None:
    assert check("keep", template(OPENING), 4, 4) == check("keep", template(CLOSED), 0, 4) == []
    assert check("keep", template(), 0, 4) == check("keep", template(), 4, 4) == []
    assert check("strip", template(CLOSED), 2, 4) == check("strip", template(known=True), 0, 4) == []
    (mixed,) = check("keep", template(), 1, 4)
    assert mixed.startswith("1 of 4 teacher responses hold a block of reasoning and the others none")
    (able,) = check("keep", template(known=True), 0, 4)
    assert "tokenizer knows <think>" in able and 'data.reasoning = "strip"' in able


def test_a_run_says_so_before_anything_is_loaded(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").write_text(CLOSED)
    made = [{"prompt": f"Why {i}?", "teacher_response": f"<think>hm</think>Because {i}."} for i in range(9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    given = [f"--data.train={tmp_path}/rows.jsonl", f"--student.model={tmp_path}/model", "--data.max_prompt_tokens=96",
             "--data.max_response_tokens=64"]  # fmt: skip
    with pytest.raises(UserError, match='set data.reasoning to "strip"'):
        read_inputs(load(given), ("warmup", "gad"))
    inputs = read_inputs(load([*given, "--data.reasoning=strip"]), ("warmup", "gad"))
    assert all("think" not in group.teacher.text for group in (*inputs.train, *inputs.held_out))
    assert any("9 of 9 teacher responses have a block of reasoning" in note for note in inputs.notes)
