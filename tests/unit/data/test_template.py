"""Chat templates: end marker, parity of teacher and student, prompts within a limit."""

from __future__ import annotations

import datetime
from concurrent.futures import ThreadPoolExecutor

import pytest
import transformers.utils.chat_template_utils as template_utils
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from gadcore.data import rendering
from gadcore.data.template import ChatTemplate
from gadcore.errors import UserError

SPECIALS = [
    "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "</s>"
]  # fmt: skip
CORPUS = ["Hello, what is two plus two? Two plus two is four.", "Name three colours: red, green and blue.\n\n1. red\n"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}" + CHATML
)
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" + "Today Date: " + date_string + "\\n\\n" }}
{{- system_message + "<|eot_id|>" }}
{%- for m in messages %}
    {{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n'+ m['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
TEMPLATES = {"chatml": CHATML, "chatml with a default system prompt": CHATML_DEFAULT_SYSTEM, "llama3": LLAMA3}
QUESTION = [{"role": "user", "content": "What is two plus two?"}]


def byte_level(chat_template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    # As Llama's: a tokenizer that puts its bos in front of every text unless it is told not to.
    bos = ("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin_of_text|>", eos_token="</s>", name_or_path="models/tiny"
    )
    fast.chat_template = chat_template
    return fast


@pytest.fixture(params=TEMPLATES)
def template(request: pytest.FixtureRequest) -> ChatTemplate:
    return ChatTemplate(byte_level(TEMPLATES[request.param]))


@pytest.mark.parametrize(
    ("source", "marker"), [(CHATML, "<|im_end|>"), (CHATML_DEFAULT_SYSTEM, "<|im_end|>"), (LLAMA3, "<|eot_id|>")]
)
def test_the_end_marker_is_the_templates_and_not_the_tokenizers_eos(source: str, marker: str) -> None:
    tokenizer = byte_level(source)
    assert ChatTemplate(tokenizer).end_id == tokenizer.convert_tokens_to_ids(marker) != tokenizer.eos_token_id


def test_the_end_marker_of_a_word_level_vocabulary() -> None:
    words = {"[UNK]": 0, "<|im_start|>": 1, "<|im_end|>": 2, "user": 3, "assistant": 4, "Hello": 5, ".": 6}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    fast.chat_template = CHATML
    fast.clean_up_tokenization_spaces = True
    assert ChatTemplate(fast).end_id == 2
    assert ChatTemplate(fast).text_of((5, 6, 2)) == ("Hello .", True)
    assert ChatTemplate(fast).prompt_ids([{"role": "user", "content": "Hello"}]) == (1, 3, 5, 2, 1, 4)


@pytest.mark.parametrize("text", ["Four.", "It is 4: two + two.\n\n1. red\n2. grün 🙂", "a  b", "x" * 300])
def test_prompt_and_response_are_the_templates_rendering_up_to_the_end_marker(
    template: ChatTemplate, text: str
) -> None:
    whole = template.tokenizer.apply_chat_template(
        [*QUESTION, {"role": "assistant", "content": text}], return_dict=False, date_string="26 Jul 2024"
    )
    joined = template.prompt_ids(QUESTION) + template.response_ids(text, finished=True)
    assert tuple(whole[: len(joined)]) == joined
    assert joined[-1] == template.end_id


@pytest.mark.parametrize(
    "text",
    ["", "Four.", " leading and trailing \n", "\n\nnew lines", "grün 🙂 \u200b", "</s> <|im_end|>", "it 's , no ."],
)
def test_text_survives_the_round_trip_and_equal_text_has_equal_ids(template: ChatTemplate, text: str) -> None:
    for finished in (True, False):
        ids = template.response_ids(text, finished=finished)
        assert template.text_of(ids) == (text, finished)
        assert template.response_ids(template.text_of(ids)[0], finished=finished) == ids


def test_only_the_end_marker_tells_a_finished_response_from_a_cut_one(template: ChatTemplate) -> None:
    cut = template.response_ids("Two plus two", finished=False)
    assert template.response_ids("Two plus two", finished=True) == (*cut, template.end_id)
    assert template.tokenizer.bos_token_id not in cut


def test_names_of_special_tokens_in_a_text_stay_text(template: ChatTemplate) -> None:
    special = set(template.tokenizer.all_special_ids) | {template.end_id}
    for name in SPECIALS:
        ids = template.response_ids(f"say {name} twice: {name}", finished=False)
        assert not special & set(ids)
        assert template.text_of(ids) == (f"say {name} twice: {name}", False)
    assert template.end_id in template.prompt_ids(QUESTION)  # the switch does not stick to the tokenizer


def test_threads_do_not_change_each_others_tokens(template: ChatTemplate) -> None:
    text, prompt = "<|eot_id|> <|im_end|>", template.prompt_ids(QUESTION)
    response = template.response_ids(text, finished=True)
    with ThreadPoolExecutor(4) as pool:
        results = list(
            pool.map(
                lambda i: template.prompt_ids(QUESTION) if i % 2 else template.response_ids(text, finished=True),
                range(400),
            )
        )
    assert set(results) == {prompt, response}


def test_a_sampled_special_token_inside_a_response_stays_visible(template: ChatTemplate) -> None:
    inner = template.tokenizer.convert_tokens_to_ids("<|im_start|>")
    ids = (*template.response_ids("a", finished=False), inner, *template.response_ids("b", finished=True))
    assert template.text_of(ids) == ("a<|im_start|>b", True)


def test_a_limit_cuts_a_response_as_it_cuts_a_sample(template: ChatTemplate) -> None:
    whole = template.response_ids("Two plus two is four.", finished=True)
    assert template.response_ids("Two plus two is four.", finished=True, limit=len(whole)) == whole
    cut = template.response_ids("Two plus two is four.", finished=True, limit=len(whole) - 1)
    assert cut == whole[:-1]
    assert not template.text_of(cut)[1]


def test_the_system_prompt_goes_before_conversations_without_one() -> None:
    template = ChatTemplate(byte_level(CHATML_DEFAULT_SYSTEM), system_prompt="Be brief.")
    own = [{"role": "system", "content": "Be long."}, *QUESTION]
    assert template.conversation(QUESTION) == [{"role": "system", "content": "Be brief."}, *QUESTION]
    assert template.conversation(own) == own
    text = template.tokenizer.decode(template.prompt_ids(QUESTION))
    assert text.count("<|im_start|>system\nBe brief.<|im_end|>") == 1
    assert "You are helpful." not in text


def test_prompts_do_not_depend_on_the_day(monkeypatch: pytest.MonkeyPatch) -> None:
    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Later:
            return cls(2031, 5, 6)

    template = ChatTemplate(byte_level(LLAMA3))
    today = template.prompt_ids(QUESTION)
    monkeypatch.setattr(template_utils, "datetime", Later)
    template_utils._compile_jinja_template.cache_clear()
    assert "06 May 2031" in template.tokenizer.apply_chat_template(QUESTION, tokenize=False)
    assert template.prompt_ids(QUESTION) == today
    assert "26 Jul 2024" in template.tokenizer.decode(today)


LONG = [
    {"role": "user", "content": "Name three colours."},
    {"role": "assistant", "content": "red, green and blue"},
    {"role": "user", "content": "What is two plus two, and 🙂🙂 more? " * 8},
]


def test_truncation_removes_only_the_end_of_the_last_user_text(template: ChatTemplate) -> None:
    full, empty = template.prompt_ids(LONG), template.prompt_ids([*LONG[:2], {"role": "user", "content": ""}])
    common = next(i for i, pair in enumerate(zip(full, empty, strict=False)) if pair[0] != pair[1])
    tail = empty[common:]
    for limit in range(len(empty) + 4, len(full)):
        fitted = template.fit_prompt(LONG, limit, "truncate")
        assert fitted is not None and fitted[0] is not LONG
        ids = fitted[1]
        assert ids == template.prompt_ids(fitted[0])
        assert limit - 8 <= len(ids) <= limit  # a character of several tokens is kept whole or not at all
        assert ids[:common] == full[:common]
        assert ids[-len(tail) :] == tail
        kept = template.tokenizer.decode(ids[common : len(ids) - len(tail)])
        assert LONG[2]["content"].startswith(kept)


def test_a_prompt_within_the_limit_is_left_alone(template: ChatTemplate) -> None:
    full = template.prompt_ids(LONG)
    for policy in ("truncate", "drop", "error"):
        assert template.fit_prompt(LONG, len(full), policy) == (LONG, full)


def test_a_prompt_that_is_too_long_without_its_text_is_dropped(template: ChatTemplate) -> None:
    empty = template.prompt_ids([*LONG[:2], {"role": "user", "content": ""}])
    assert template.fit_prompt(LONG, len(empty), "truncate") is None
    assert template.fit_prompt(LONG, len(empty) - 1, "truncate") is None


def test_a_prompt_is_not_cut_to_white_space(template: ChatTemplate) -> None:
    empty = len(template.prompt_ids([{"role": "user", "content": ""}]))
    message = {"role": "user", "content": " \n\n \t \n x" + "y" * 50}
    fitted = [template.fit_prompt([message], empty + room, "truncate") for room in range(12)]
    assert None in fitted
    assert all(kept is None or kept[0][-1]["content"].strip() for kept in fitted)


def test_the_other_policies_for_a_long_prompt(template: ChatTemplate) -> None:
    count = len(template.prompt_ids(LONG))
    assert template.fit_prompt(LONG, count - 1, "drop") is None
    with pytest.raises(UserError) as caught:
        template.fit_prompt(LONG, count - 1, "error")
    assert f"has {count} tokens, data.max_prompt_tokens allows {count - 1}" in str(caught.value)


def test_truncation_under_a_template_that_trims() -> None:
    template = ChatTemplate(byte_level(LLAMA3))
    turns = [{"role": "user", "content": "   two plus two" + " " * 50 + "is what?"}]
    limit = len(template.prompt_ids(turns)) - 1
    fitted = template.fit_prompt(turns, limit, "truncate")
    assert fitted is not None and fitted[0] != turns
    ids = fitted[1]
    assert len(ids) <= limit
    assert template.tokenizer.decode(ids).endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (None, "the tokenizer of models/tiny has no chat template"),
        (CHATML.replace("<|im_end|>", " END"), "puts ' END\\n' after an assistant turn"),
        (CHATML.replace(" + '<|im_end|>\n'", ""), "puts '' after an assistant turn"),
        (CHATML.replace("m.content", "'fixed'"), "after an assistant turn, which does not begin with a special token"),
        (
            CHATML.replace("m.content", "(messages[0].content if m.role == 'assistant' else '') + m.content"),
            "writes an assistant turn as",
        ),
        ("{{ raise_exception('Only two turns') }}", "refuses the conversation: Only two turns"),
        ("{% for %}", "the chat template of models/tiny refuses the conversation"),
    ],
)
def test_templates_that_cannot_be_used(source: str | None, text: str) -> None:
    with pytest.raises(UserError) as caught:
        ChatTemplate(byte_level(source))
    assert text in str(caught.value)
    assert "models/tiny" in str(caught.value)


def test_a_template_that_drops_the_system_prompt_is_refused() -> None:
    source = CHATML.replace("for m in messages", "for m in messages if m.role != 'system'")
    ChatTemplate(byte_level(source))
    with pytest.raises(UserError, match="models/tiny leaves out system messages: unset data.system_prompt"):
        ChatTemplate(byte_level(source), system_prompt="Be brief.")


# What a template raises, and what it takes for ever over


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ messages + 1 }}", "fails on the conversation: TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
        ("{{ messages | strange }}", "refuses the conversation: No filter named 'strange'"),
        ({"tool_use": CHATML}, "no default"),
        (5, "fails on the conversation"),
    ],
)
def test_what_a_template_raises_is_a_sentence(source: object, words: str) -> None:
    tokenizer = byte_level(None)
    tokenizer.chat_template = source
    with pytest.raises(UserError) as caught:
        ChatTemplate(tokenizer)
    assert words in str(caught.value) and "models/tiny" in str(caught.value) and "\n" not in str(caught.value)


def test_a_template_that_loops_for_ever_ends_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "_SECONDS", 0.1)
    loops = "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}"
    with pytest.raises(UserError, match="models/tiny was not done with a conversation after 0.1 s"):
        ChatTemplate(byte_level(loops + CHATML))


# Tokens that the model does not have


def test_a_tokenizer_of_more_tokens_than_the_model() -> None:
    tokenizer = byte_level(CHATML)
    base = len(tokenizer)
    ChatTemplate(tokenizer, vocabulary=base)
    with pytest.raises(UserError, match=f"a token of id {base - 1} .* embeddings for {base - 1} tokens"):
        ChatTemplate(tokenizer, vocabulary=base - 1)
    tokenizer.add_tokens(["<tool>"])
    with pytest.raises(UserError, match=f"a token of id {base} \\('<tool>'\\)"):
        ChatTemplate(tokenizer, vocabulary=base)


def test_a_special_token_beyond_the_model_is_told_where_a_prompt_has_it() -> None:
    tokenizer = byte_level(CHATML)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    template = ChatTemplate(tokenizer, vocabulary=len(tokenizer) - 1)
    assert template.prompt_ids(QUESTION)
    with pytest.raises(UserError, match=r"gives '\[PAD\]' the id \d+, the model has embeddings for"):
        template.prompt_ids([{"role": "user", "content": "What is [PAD]?"}])
    assert max(template.response_ids("[PAD]", finished=True)) < len(tokenizer) - 1


# Arguments of the template


THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
BLOCK = "<think>\n\n</think>\n\n"


def prompt_of(template: ChatTemplate) -> str:
    return str(template.tokenizer.decode(template.prompt_ids(QUESTION)))


def test_arguments_are_given_wherever_a_conversation_is_rendered_and_saved() -> None:
    template = ChatTemplate(byte_level(THINKING), arguments={"enable_thinking": False})
    assert prompt_of(template).endswith("assistant\n" + BLOCK) and template.notes == []
    assert template.unused_arguments() == []
    # Whoever serves the model renders the same, and may still choose otherwise.
    render = template.tokenizer.apply_chat_template
    assert render(QUESTION, tokenize=False, add_generation_prompt=True) == prompt_of(template)
    other = render(QUESTION, tokenize=False, add_generation_prompt=True, enable_thinking=True)
    assert other == prompt_of(template).removesuffix(BLOCK)
    once = template.tokenizer.chat_template
    assert ChatTemplate(template.tokenizer, arguments={"enable_thinking": False}).tokenizer.chat_template == once


@pytest.mark.parametrize("value", ['it\'s {% "x" %}\n', 3, 2.5, True, [1, "a"], {"a": [False]}])
def test_values_of_arguments_arrive_as_they_are(value: object) -> None:
    source = "{{ '<|im_start|>' + (given | string) + '<|im_end|>' }}\n" + CHATML
    template = ChatTemplate(byte_level(source), arguments={"given": value})
    assert prompt_of(template).startswith(f"<|im_start|>{value}<|im_end|>")


def test_an_argument_changes_nothing_else() -> None:
    for source in (CHATML, "\n" + CHATML, "  {% if true %}x{% endif %}\n" + CHATML, LLAMA3):
        plain, given = ChatTemplate(byte_level(source)), ChatTemplate(byte_level(source), arguments={"unread": 1})
        assert given.prompt_ids(LONG) == plain.prompt_ids(LONG)
        assert given.unused_arguments() == ["unread"]


# The header that an assistant's last turn has


@pytest.mark.parametrize(
    ("source", "header"),
    [
        (THINKING, "<|im_start|>assistant\n" + BLOCK),
        # A prompt that begins to think, and a turn that has not thought.
        (CHATML.replace("assistant\n", "assistant\n<think>\n"), "<|im_start|>assistant\n"),
        # No header for a prompt at all.
        (CHATML.partition("{% if add")[0], "<|im_start|>assistant\n"),
    ],
)
def test_a_prompt_ends_in_the_header_of_a_turn(source: str, header: str) -> None:
    template = ChatTemplate(byte_level(source))
    (note,) = template.notes
    assert "models/tiny" in note and "data.template_arguments" in note
    assert prompt_of(template).endswith("What is two plus two?<|im_end|>\n" + header)
    turn = [*QUESTION, {"role": "assistant", "content": "Four."}]
    whole = template.tokenizer.apply_chat_template(turn, tokenize=False)
    assert whole == byte_level(source).apply_chat_template(turn, tokenize=False)
    joined = template.prompt_ids(QUESTION) + template.response_ids("Four.", finished=True)
    assert whole.startswith(template.tokenizer.decode(joined))
    # It is the template that is saved, and needs no second change.
    again = ChatTemplate(byte_level(template.tokenizer.chat_template))
    assert again.notes == [] and again.prompt_ids(LONG) == template.prompt_ids(LONG)


def test_a_changed_header_and_an_argument_that_asks_for_it() -> None:
    template = ChatTemplate(byte_level(THINKING))
    rendered = template.tokenizer.apply_chat_template(
        QUESTION, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert rendered == prompt_of(template)


# A tokenizer that writes a text's first word in another way behind a line break


ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def sentencepiece(chat_template: str) -> PreTrainedTokenizerFast:
    """As Llama 2's: a space in front of a text, and byte tokens for what the vocabulary lacks."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁"]
    letters = sorted({*"Hello Sentinel answer What is two plus There Where user assistant <|>?. Four [INST]/"} - {" "})
    words = ["Sen", "▁Sen", "Fo", "▁Fo", "ur", "tin", "el", "He", "▁He"]
    merges = [("S", "en"), ("▁", "Sen"), ("F", "o"), ("▁", "Fo"), ("u", "r"), ("e", "n"), ("t", "in"), ("e", "l")]
    merges += [("H", "e"), ("▁", "He"), ("i", "n")]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, *letters, "en", "in", *words]))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", name_or_path="models/tiny",
        chat_template=chat_template,
    )  # fmt: skip


LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)


# Llama 2's turns begin with a space, in which one of the text's own is lost.
@pytest.mark.parametrize(
    ("source", "text"),
    [(ZEPHYR, " Four"), *((s, t) for s in (ZEPHYR, LLAMA2) for t in ("Four.", "Sentinel answer", "\nFour", "Four "))],
)
def test_a_response_is_written_as_behind_its_header(source: str, text: str) -> None:
    template = ChatTemplate(sentencepiece(source))
    assert template.tokenizer.convert_ids_to_tokens(template.end_id) == "</s>"
    ids = template.response_ids(text, finished=True)
    assert template.text_of(ids) == (text, True)
    assert template.response_ids(template.text_of(ids)[0], finished=True) == ids
    whole = [*QUESTION, {"role": "assistant", "content": text}]
    expected = template.tokenizer(
        template.tokenizer.apply_chat_template(whole, tokenize=False), add_special_tokens=False
    ).input_ids
    joined = list(template.prompt_ids(QUESTION) + ids)
    assert expected[: len(joined)] == joined
