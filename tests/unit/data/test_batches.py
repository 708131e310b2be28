"""Groups from rows under the length limits, and batches that can be restored."""

from __future__ import annotations

import json
from itertools import islice

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gadcore.config.data import DataSettings
from gadcore.data.batches import DataReport, Loader, build_prompts
from gadcore.data.forms import RawRow
from gadcore.data.groups import Group, Prompt, Response
from gadcore.data.template import ChatTemplate
from gadcore.errors import UserError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    """One token per byte, so that lengths can be counted by hand."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, name_or_path="models/tiny")
    fast.chat_template = CHATML
    return ChatTemplate(fast, system_prompt="S")


def row(prompt: str, response: str, number: int = 1) -> RawRow:
    return RawRow(({"role": "user", "content": prompt},), response, f"train.jsonl:{number}")


def overhead(template: ChatTemplate) -> int:
    return len(template.prompt_ids([{"role": "user", "content": ""}]))


def test_a_row_becomes_a_group_without_samples(template: ChatTemplate) -> None:
    groups, report = build_prompts([row("Hello", "Hi.")], template, DataSettings())
    messages = ({"role": "system", "content": "S"}, {"role": "user", "content": "Hello"})
    prompt = Prompt(0, messages, template.prompt_ids(messages))
    assert groups == [Group(prompt, Response("Hi.", template.response_ids("Hi.", finished=True), True))]
    assert report == DataReport(1, 0, 0, 0, 0, 4.0)
    assert report.sentences() == []


def test_a_long_prompt_is_truncated_in_ids_and_messages(template: ChatTemplate) -> None:
    limit = overhead(template) + 5
    groups, report = build_prompts(
        [row("abcdefgh", "x"), row("abcde", "x")], template, DataSettings(max_prompt_tokens=limit)
    )
    assert [group.prompt.messages[-1]["content"] for group in groups] == ["abcde", "abcde"]
    assert groups[0].prompt.token_ids == groups[1].prompt.token_ids
    assert report.truncated_prompts == 1
    assert report.sentences() == [
        f"1 of 2 prompts were truncated to data.max_prompt_tokens: the limit is {limit} tokens, 95 % of the rows need "
        f"{limit + 3}, 99 % {limit + 3}"
    ]


def test_dropped_prompts_keep_the_numbers_of_the_others(template: ChatTemplate) -> None:
    settings = DataSettings(max_prompt_tokens=overhead(template) + 5, long_prompt="drop")
    groups, report = build_prompts([row("abcdefgh", "x"), row("abc", "x")], template, settings)
    assert [group.prompt.index for group in groups] == [1]
    (told,) = report.sentences()
    assert told.startswith("1 of 2 rows were left out because their prompt is too long: the limit is ")


def test_a_prompt_whose_earlier_turns_are_too_long_is_dropped_and_told(template: ChatTemplate) -> None:
    turns = [{"role": "user", "content": "x" * 50}, {"role": "assistant", "content": "y"}]
    long = RawRow((*turns, {"role": "user", "content": "z"}), "x", "train.jsonl:1")
    settings = DataSettings(max_prompt_tokens=overhead(template) + 5)
    _, report = build_prompts([long, row("abc", "x")], template, settings)
    assert (report.truncated_prompts, report.dropped_prompts) == (0, 1)


def test_a_long_response_is_cut_as_a_sample_would_be(template: ChatTemplate) -> None:
    # The end marker counts: five letters fill six tokens.
    groups, report = build_prompts(
        [row("a", "abcde"), row("a", "abcdef")], template, DataSettings(max_response_tokens=6)
    )
    assert groups[0].teacher == Response("abcde", template.response_ids("abcde", finished=True), True)
    assert groups[1].teacher == Response("abcdef", template.response_ids("abcdef", finished=False), False)
    assert report == DataReport(2, 0, 0, 1, 0, 6.0)
    (told,) = report.sentences()
    assert told == (
        "1 of 2 teacher responses were cut at data.max_response_tokens: the limit is 6 tokens, 95 % of the rows need "
        "7, 99 % 7"
    )
    assert report.warnings() == [told]


def test_a_cut_may_have_a_limit_of_its_own(template: ChatTemplate) -> None:
    groups, _ = build_prompts([row("a", "abcdef")], template, DataSettings(), cut_limit=2)
    assert (groups[0].teacher.text, groups[0].teacher.finished) == ("ab", False)


def test_dropped_responses_are_counted_and_their_prompts_are_not(template: ChatTemplate) -> None:
    settings = DataSettings(
        max_response_tokens=4, long_response="drop", max_prompt_tokens=overhead(template) + 1, long_prompt="truncate"
    )
    groups, report = build_prompts([row("abc", "abcdef"), row("a", "abc")], template, settings)
    assert [group.prompt.index for group in groups] == [1]
    assert report == DataReport(2, 0, 0, 0, 1, 4.0)
    (told,) = report.sentences()
    assert told.startswith(
        "1 of 2 rows were left out because the teacher's response is too long: the limit is 4 tokens"
    )


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            DataSettings(max_response_tokens=3, long_response="error"),
            "train.jsonl:7: the teacher's response has 7 tokens, data.max_response_tokens allows 3",
        ),
        (DataSettings(max_prompt_tokens=3, long_prompt="error"), "train.jsonl:7: the prompt has "),
        (
            DataSettings(max_prompt_tokens=3, long_prompt="drop"),
            "no usable rows are left: 1 of 1 rows were left out because their prompt is too long",
        ),
    ],
)
def test_rows_that_are_refused(template: ChatTemplate, settings: DataSettings, text: str) -> None:
    with pytest.raises(UserError) as caught:
        build_prompts([row("abc", "abcdef", 7)], template, settings)
    assert str(caught.value).startswith(text)


def groups_of(count: int) -> list[Group]:
    return [Group(Prompt(i, (), (i,)), Response(str(i), (i,), True)) for i in range(count)]


def indices(batches: object) -> list[list[int]]:
    return [[group.prompt.index for group in batch] for batch in batches]  # type: ignore[attr-defined]


def test_an_epoch_uses_every_group_once_and_its_last_batch_is_smaller() -> None:
    loader = Loader(groups_of(10), 4, seed=0)
    epoch = indices(loader.batches(0))
    assert loader.steps_per_epoch == len(epoch) == 3
    assert [len(batch) for batch in epoch] == [4, 4, 2]
    assert sorted(sum(epoch, [])) == list(range(10))


def test_a_batch_size_above_the_number_of_groups_gives_one_smaller_batch() -> None:
    loader = Loader(groups_of(3), 8, seed=0)
    assert loader.steps_per_epoch == 1
    assert [sorted(batch) for batch in indices(islice(loader, 2))] == [[0, 1, 2], [0, 1, 2]]
    assert loader.epoch == 2


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    loader = Loader(groups_of(20), 4, seed=3)
    first, second = indices(loader.batches(0)), indices(loader.batches(1))
    assert first != second
    assert first != indices(Loader(groups_of(20), 4, seed=4).batches(0))
    assert indices(loader.batches(0)) == first
    assert indices(Loader(groups_of(20), 4, seed=3).batches(1)) == second
    assert indices([loader.batch(1, 2)]) == [second[2]]


def test_the_iterator_goes_through_the_epochs() -> None:
    loader = Loader(groups_of(10), 4, seed=0)
    assert indices(islice(loader, 6)) == indices(loader.batches(0)) + indices(loader.batches(1))


@pytest.mark.parametrize("steps", range(7))
def test_a_restored_loader_goes_on_with_the_next_batch(steps: int) -> None:
    loader = Loader(groups_of(10), 4, seed=0)
    list(islice(loader, steps))
    state = json.loads(json.dumps(loader.state()))
    other = Loader(groups_of(10), 4, seed=0)
    other.restore(state)
    assert indices(islice(other, 5)) == indices(islice(loader, 5))


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (Loader(groups_of(9), 4, seed=0), "rows = 10, this run has rows = 9"),
        (Loader(groups_of(10), 5, seed=0), "batch_size = 4, this run has batch_size = 5"),
        (Loader(groups_of(10), 4, seed=1), "seed = 0, this run has seed = 1"),
    ],
)
def test_a_state_of_another_order_is_refused(other: Loader, text: str) -> None:
    with pytest.raises(UserError, match=text):
        other.restore(Loader(groups_of(10), 4, seed=0).state())


def test_batches_hold_fresh_groups() -> None:
    groups = groups_of(4)
    loader = Loader(groups, 4, seed=0)
    for group in loader.batch(0, 0):
        group.samples.append(group.teacher)
    assert not any(group.samples for group in groups)
    assert not any(group.samples for group in loader.batch(0, 0))


def test_a_row_with_a_token_that_the_model_lacks_is_named(template: ChatTemplate) -> None:
    words = template.tokenizer
    words.add_special_tokens({"pad_token": "[PAD]"})
    limited = ChatTemplate(words, vocabulary=len(words) - 1)
    with pytest.raises(UserError, match=r"embeddings for \d+ tokens") as caught:
        build_prompts([row("a", "b"), row("a [PAD]", "b", 2)], limited, DataSettings())
    assert row("", "", 2).where in str(caught.value)
