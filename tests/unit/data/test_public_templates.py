"""What becomes of the chat templates of public models: the header that a prompt ends in, and the end marker.

Most are those that TRL ships for its own tests, as the models have them.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gadcore.data.rendering import render
from gadcore.data.template import ChatTemplate
from gadcore.errors import UserError

IM = "<|im_start|>assistant\n"
EMPTY = "<think>\n\n</think>\n\n"
GEMMA4 = ("<|turn>model\n", "<turn|>")
LLAMA3 = ("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>")
DEEPSEEK = ("<｜Assistant｜>", "<｜end▁of▁sentence｜>")

# Template of TRL -> (end of a prompt, end marker), and whether the header is changed and told.
AS_THEY_ARE = {
    "cohere": ("<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    "cohere2": ("<|CHATBOT_TOKEN|><|START_RESPONSE|>", "<|END_RESPONSE|>"),
    "gemma": ("<start_of_turn>model\n", "<end_of_turn>"),
    "gemma3": ("<start_of_turn>model\n", "<end_of_turn>"),
    "gemma4": GEMMA4,
    "lfm2": (IM, "<|im_end|>"),
    "llama3": LLAMA3,
    "llama3_1": LLAMA3,
    "llama3_2": LLAMA3,
    "phi3": ("<|assistant|>\n", "<|end|>"),
    "phi3_5": ("<|assistant|>\n", "<|end|>"),
    "qwen2_5": (IM, "<|im_end|>"),
    "qwen2_5_vl": (IM, "<|im_end|>"),
    "qwen3_instruct_2507": (IM, "<|im_end|>"),
    "qwen3_5_nothink": (IM + EMPTY, "<|im_end|>"),
    "qwen3_vl": (IM, "<|im_end|>"),
}
WITH_THE_TURNS_HEADER = {
    "deepseek_r1_distill": DEEPSEEK,
    "deepseekv3": DEEPSEEK,
    "gptoss": ("<|start|>assistant<|channel|>final<|message|>", "<|return|>"),
    "nemotron_3_nano": (IM + "<think></think>", "<|im_end|>"),
    "nemotron_3_super": (IM + "<think></think>", "<|im_end|>"),
    "nemotron_3_ultra": (IM + "<think></think>", "<|im_end|>"),
    "qwen3": (IM + EMPTY, "<|im_end|>"),
    "qwen3_5_think": (IM + EMPTY, "<|im_end|>"),
    "qwen3_6": (IM + EMPTY, "<|im_end|>"),
}
# Their turns end where the next one begins, or have parts of several kinds.
REFUSED = {"glm4moe": "puts '' after", "idefics3": "puts", "smolvlm": "puts", "llava_next": "no attribute 'text'"}

# Short ones, close to their models' own; Vicuna has none, this renders its conversation.
CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WRITTEN = {
    "ChatML (Yi, Hermes 2, InternLM 2, Qwen 1.5)": (CHATML, IM, "<|im_end|>"),
    "SmolLM2": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
        + CHATML.partition("{% for message in messages %}")[2],
        IM,
        "<|im_end|>",
    ),
    "Zephyr, TinyLlama": (
        "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
        "{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n"
        "{{ '<|system|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n"
        "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
        "<|assistant|>\n",
        "</s>",
    ),
    "OLMo, OLMo 2": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '<|user|>\n' + message['content'] + '\n' }}{% elif message['role'] == 'assistant' %}"
        "{% if not loop.last %}{{ '<|assistant|>\n'  + message['content'] + eos_token + '\n' }}{% else %}"
        "{{ '<|assistant|>\n'  + message['content'] + eos_token }}{% endif %}{% endif %}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}",
        "<|assistant|>\n",
        "</s>",
    ),
    "Mistral 7B Instruct 0.1": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
        "{{ message['content'] + eos_token + ' ' }}{% endif %}{% endfor %}",
        "[/INST]",
        "</s>",
    ),
    "Granite 3": (
        "{%- for message in messages %}{{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + "
        "message['content'] + '<|end_of_text|>\n' }}{%- if loop.last and add_generation_prompt %}"
        "{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}{%- endfor %}",
        "<|start_of_role|>assistant<|end_of_role|>",
        "<|end_of_text|>",
    ),
    "Vicuna": (
        "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
        "{% else %}{{ 'ASSISTANT: ' + message['content'] + '</s>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}",
        "ASSISTANT: ",
        "</s>",
    ),
}
QUESTION = [{"role": "user", "content": "What is two plus two?"}]
ANSWER = {"role": "assistant", "content": "Four."}


def tokenizer(source: str) -> PreTrainedTokenizerFast:
    """Bytes, and every special token that the template writes."""
    named = re.findall(r"<\|[\w/]+\|>|<｜[^｜<>]+｜>|<(?:start|end)_of_turn>|<turn\|>|<\|turn>|\[gMASK\]|<sop>", source)
    special = list(dict.fromkeys(["<s>", "</s>", *named, *re.findall("<end_of_utterance>", source)]))
    # Zephyr's and OLMo's roles are text in their vocabularies.
    if "message['content'] + eos_token" in source:
        special = special[:2]
    pieces = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytes_only = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bytes_only, bos_token="<s>", eos_token="</s>", name_or_path="models/public",
        additional_special_tokens=special[2:],
    )  # fmt: skip
    fast.chat_template = source
    return fast


def of_trl(name: str) -> str:
    trl = pytest.importorskip("trl")
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def check(source: str, header: str, marker: str) -> ChatTemplate:
    template = ChatTemplate(tokenizer(source))
    words = template.tokenizer
    assert words.convert_ids_to_tokens(template.end_id) == marker
    prompt = template.prompt_ids(QUESTION)
    assert words.decode(prompt).endswith(header)
    # A turn is the prompt, the text and the marker, in the template as its model has it.
    whole = render(tokenizer(source), [*QUESTION, ANSWER], header=False)
    assert whole.startswith(words.decode(prompt + template.response_ids("Four.", finished=True)))
    return template


@pytest.mark.parametrize("name", AS_THEY_ARE)
def test_templates_that_are_taken_as_they_are(name: str) -> None:
    source = of_trl(name)
    template = check(source, *AS_THEY_ARE[name])
    assert template.notes == [] and template.tokenizer.chat_template == source


@pytest.mark.parametrize("name", WITH_THE_TURNS_HEADER)
def test_templates_whose_prompts_get_the_header_of_a_turn(name: str) -> None:
    assert len(check(of_trl(name), *WITH_THE_TURNS_HEADER[name]).notes) == 1


@pytest.mark.parametrize("name", ["qwen3", "qwen3_6", "nemotron_3_nano"])
def test_hybrids_that_are_told_not_to_think_stay_as_they_are(name: str) -> None:
    template = ChatTemplate(tokenizer(of_trl(name)), arguments={"enable_thinking": False})
    assert template.notes == [] and template.unused_arguments() == []
    assert template.tokenizer.decode(template.prompt_ids(QUESTION)).endswith(WITH_THE_TURNS_HEADER[name][0])


@pytest.mark.parametrize("name", REFUSED)
def test_templates_that_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="models/public") as caught:
        ChatTemplate(tokenizer(of_trl(name)))
    assert REFUSED[name] in str(caught.value)


@pytest.mark.parametrize("name", WRITTEN)
def test_short_templates(name: str) -> None:
    assert check(*WRITTEN[name]).notes == []
