"""Random models of given shapes, and groups of random words that pass through them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.step.problem import SPECIAL, word_tokenizer
from gadcore.data.groups import Group, Prompt, Response
from gadcore.data.template import ChatTemplate
from gadcore.models.loading import save_model

Shape = dict[str, int]

# Qwen2.5-3B's, in Llama's words: transformers gives a folder of Qwen2's another tokenizer than the one it holds.
QWEN_3B: Shape = dict(
    hidden_size=2048,
    num_hidden_layers=36,
    num_attention_heads=16,
    num_key_value_heads=2,
    intermediate_size=11008,
    vocab_size=151936,
    max_position_embeddings=32768,
)
# Heads as wide as the Triton kernels take them.
TINY: Shape = dict(
    hidden_size=128,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=160,
    vocab_size=320,
    max_position_embeddings=512,
)


def config_of(shape: Shape) -> LlamaConfig:
    settings: dict[str, Any] = shape
    end, pad = SPECIAL.index("<|end|>"), SPECIAL.index("<pad>")
    return LlamaConfig(
        **settings,
        attention_bias=True,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
    )


def parameters(shape: Shape) -> int:
    """Of a model of this shape; none is made."""
    with torch.device("meta"):
        return sum(p.numel() for p in LlamaForCausalLM(config_of(shape)).parameters())


def fewer_layers(shape: Shape, most_parameters: float) -> Shape:
    """The shape, with as few layers fewer as leave at most so many parameters; one layer is always left."""
    layers = shape["num_hidden_layers"]
    one, two = (parameters({**shape, "num_hidden_layers": n}) for n in (1, 2))
    fits = 1 + int((most_parameters - one) // (two - one))
    return {**shape, "num_hidden_layers": max(1, min(layers, fits))}


def random_model(shape: Shape, device: torch.device, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The same weights on every call on a device. Made where it is to lie: a host would take minutes for 3B."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return LlamaForCausalLM(config_of(shape)).eval()
    finally:
        torch.set_default_dtype(before)


def save_random(shape: Shape, folder: Path, device: torch.device, dtype: torch.dtype) -> str:
    """A directory with a random model and a tokenizer of a token a word."""
    save_model(random_model(shape, device, dtype), word_tokenizer(shape["vocab_size"]), folder)
    return str(folder)


def save_settings(shape: Shape, folder: Path) -> str:
    """A directory with a config.json alone: what a plan reads."""
    config_of(shape).save_pretrained(folder)
    return str(folder)


def groups(template: ChatTemplate, count: int, prompt: int, response: int, samples: int) -> list[Group]:
    """Groups of random words, responses cut at `response` tokens; prompts have about `prompt` tokens."""
    source = random.Random(0)
    words = [f"w{i}" for i in range(len(template.tokenizer) - len(SPECIAL))]

    def said(length: int) -> Response:
        text = " ".join(source.choices(words, k=length))
        ids = template.response_ids(text, finished=False)
        return Response(text, ids, False, tuple(-source.random() for _ in ids))

    made = []
    for index in range(count):
        messages = ({"role": "user", "content": " ".join(source.choices(words, k=prompt))},)
        lengths = [max(2, response - i) for i in range(samples)]
        asked = Prompt(index, messages, template.prompt_ids(messages))
        made.append(Group(asked, said(response), [said(length) for length in lengths]))
    return made


def token_groups(vocabulary: int, count: int, prompt: int, response: int, samples: int) -> list[Group]:
    """Groups of random token ids of just these lengths, without texts: what a student's pass needs."""
    source = random.Random(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(source.choices(range(len(SPECIAL), vocabulary), k=length))

    def said() -> Response:
        return Response("", ids(response), False, (-12.0,) * response)

    return [Group(Prompt(i, (), ids(prompt)), said(), [said() for _ in range(samples)]) for i in range(count)]
