"""Tiny random models with a real tokenizer and chat template: seconds instead of minutes."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "The capital of France is Paris, a city on the Seine.",
    "Water boils at one hundred degrees and freezes at zero.",
    "Write a short answer, then stop; user, assistant and system take turns.",
]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=CHATML,
    )


# What makes each family a case of its own: attention bias, q/k norm, a sliding window that hides tokens of the tiny
# texts (in all layers, or in every second one beside norms after attention and MLP), layers without positions.
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, dict(head_dim=32)),
    "llama with bias": (LlamaForCausalLM, LlamaConfig, dict(head_dim=32, attention_bias=True)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, dict(head_dim=32)),
    "mistral": (MistralForCausalLM, MistralConfig, dict(head_dim=32, sliding_window=9)),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        dict(
            head_dim=32,
            query_pre_attn_scalar=32,
            sliding_window=9,
            layer_types=["full_attention", "sliding_attention"],
        ),
    ),
    "smollm3": (SmolLM3ForCausalLM, SmolLM3Config, dict(no_rope_layers=[1, 0])),
}
# Which the sampler alone is asked about: norms over all heads together; one matrix for q, k and v, head by head, a
# rotation of a part of each, attention and MLP side by side.
MORE_FAMILIES = {
    "olmo2": (Olmo2ForCausalLM, Olmo2Config, {}),
    # Its heads share no keys. vLLM would believe another number, which transformers does not know of this family.
    "gpt_neox": (GPTNeoXForCausalLM, GPTNeoXConfig, dict(num_key_value_heads=2)),
}


def tiny_model(
    kind: str = "llama", *, tied: bool = True, seed: int = 0, kv_heads: int = 1, head_dim: int | None = None
):
    """A random model of two layers over the tiny tokenizer's vocabulary; kind: one of FAMILIES or MORE_FAMILIES.

    head_dim: default the family's; the kernels for a GPU take 64 and more.
    """
    model, config, special = (FAMILIES | MORE_FAMILIES)[kind]
    if head_dim is not None:
        special = special | dict(head_dim=head_dim)
    shape = dict(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=kv_heads,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=2,
    )
    torch.manual_seed(seed)
    made = model(config(**shape | special)).eval()
    with torch.no_grad():
        # Norms and biases as training leaves them: at 1 and 0 their mistakes would not show.
        for name, p in made.named_parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p), alpha=0.1 if name.endswith("bias") else 0.02)
    return made


def save_tiny(
    directory: Path,
    kind: str = "llama",
    *,
    tied: bool = True,
    seed: int = 0,
    kv_heads: int = 1,
    head_dim: int | None = None,
) -> Path:
    """A model directory as a user would have it."""
    model = tiny_model(kind, tied=tied, seed=seed, kv_heads=kv_heads, head_dim=head_dim)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory
