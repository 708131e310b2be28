"""Small random models on disk with a tokenizer of whole words, for the designed data sets and for quick runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

HIDDEN, LAYERS = 32, 1


def save(
    folder: Path,
    words: Sequence[str],
    seed: int,
    *,
    hidden: int = HIDDEN,
    layers: int = LAYERS,
    window: int | None = None,
) -> Path:
    """Writes a random Llama and its tokenizer as a model directory, unless it is there; returns the folder.

    window: tokens that attention reaches back to, the token itself included: a Mistral then.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    from bench.paper.toy import WordTemplate

    if (folder / "model.safetensors").is_file():
        return folder
    template = WordTemplate(words)
    torch.manual_seed(seed)
    shape = dict(
        vocab_size=len(template.vocabulary),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=template.end_id,
        pad_token_id=template.end_id,
    )
    if window is None:
        model = LlamaForCausalLM(LlamaConfig(**shape))
    else:
        model = MistralForCausalLM(MistralConfig(**shape, sliding_window=window))
    template.tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder
