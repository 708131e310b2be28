"""The decoder of the stand-in for vLLM: Llama's and Qwen2's, weights fused as vLLM has them, a paged KV cache."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

# DEFAULT_VOCAB_PADDING_SIZE in model_executor/layers/vocab_parallel_embedding.py.
_VOCABULARY = 64
_MODELS = ("llama", "qwen2")


class Cache:
    """Keys and values of all layers in blocks, and which of them hold the beginning of which text.

    tensors: a layer's, [2, blocks, block_size, kv_heads, head_dim].
    """

    def __init__(self, model: Model, blocks: int, block_size: int, *, enabled: bool) -> None:
        shape = (2, blocks, block_size, model.config.num_key_value_heads, model.head_dim)
        self.tensors = [torch.empty(shape, dtype=model.dtype, device="cuda") for _ in model.model.layers]
        self.block_size, self._enabled = block_size, enabled
        self._free = list(range(blocks))
        # Text up to the end of a block -> the block.
        self._known: dict[tuple[int, ...], int] = {}

    def reset(self) -> None:
        self._free += self._known.values()
        self._known.clear()

    @contextmanager
    def sequence(self, tokens: list[int]) -> Iterator[Text]:
        """Blocks for a text that grows; its prompt's full blocks stay known afterwards."""
        size, prompt = self.block_size, len(tokens)
        made = Text(self)
        # KVCacheManager.get_computed_blocks() in v1/core/kv_cache_manager.py: never the last token, whose logits are
        # asked for.
        while (block := self._known.get(tuple(tokens[: made.computed + size]))) is not None:
            if made.computed + size >= prompt:
                break
            made.blocks.append(block)
            made.computed += size
        shared = len(made.blocks)
        yield made
        for place, block in enumerate(made.blocks[shared:], shared):
            text = tuple(tokens[: (place + 1) * size])
            if self._enabled and (place + 1) * size <= prompt and text not in self._known:
                self._known[text] = block
            else:
                self._free.append(block)

    def take(self, used: list[int]) -> int:
        """A block for a text that has those."""
        if not self._free:
            # BlockPool.get_new_blocks() in v1/core/block_pool.py forgets what was known for longest.
            oldest = next(text for text, block in self._known.items() if block not in used)
            self._free.append(self._known.pop(oldest))
        return self._free.pop()


@dataclass
class Text:
    """A text's blocks; keys and values of its first `computed` tokens are there."""

    cache: Cache
    blocks: list[int] = field(default_factory=list)
    computed: int = 0

    def extend(self, length: int) -> None:
        while len(self.blocks) * self.cache.block_size < length:
            self.blocks.append(self.cache.take(self.blocks))

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes [new, kv_heads, head_dim] behind the computed tokens; returns those of all, [tokens, ..]."""
        cache, size = self.cache.tensors[layer], self.cache.block_size
        places = range(self.computed, self.computed + len(keys))
        blocks, offsets = [self.blocks[at // size] for at in places], [at % size for at in places]
        cache[0, blocks, offsets], cache[1, blocks, offsets] = keys, values
        both = cache[:, self.blocks].flatten(1, 2)[:, : self.computed + len(keys)]
        return both[0], both[1]


def _weight(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=dtype, device="cuda"), requires_grad=False)


class Linear(nn.Module):
    def __init__(
        self, inputs: int, outputs: int, dtype: torch.dtype, *, bias: bool = False, widths: tuple[int, ...] = ()
    ) -> None:
        """widths: outputs of each of the layers that are one here."""
        super().__init__()
        self.widths = widths or (outputs,)
        self.weight = _weight(outputs, inputs, dtype=dtype)
        self.bias = _weight(outputs, dtype=dtype) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Norm(nn.Module):
    def __init__(self, width: int, epsilon: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = _weight(width, dtype=dtype)
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return normed.to(x.dtype) * self.weight


class Layer(nn.Module):
    """LlamaDecoderLayer and Qwen2DecoderLayer in model_executor/models/: names and fused projections are theirs."""

    def __init__(self, config: PreTrainedConfig, number: int, head_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.number, self.head_dim = number, head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        hidden, width = config.hidden_size, self.heads * head_dim
        qwen2 = config.model_type == "qwen2"
        bias, mlp_bias = qwen2 or config.attention_bias, not qwen2 and config.mlp_bias
        widths = width, self.kv_heads * head_dim, self.kv_heads * head_dim
        middle = config.intermediate_size
        self.input_layernorm = Norm(hidden, config.rms_norm_eps, dtype)
        self.self_attn = nn.Module()
        self.self_attn.qkv_proj = Linear(hidden, sum(widths), dtype, bias=bias, widths=widths)
        self.self_attn.o_proj = Linear(width, hidden, dtype, bias=bias and not qwen2)
        self.post_attention_layernorm = Norm(hidden, config.rms_norm_eps, dtype)
        self.mlp = nn.Module()
        self.mlp.gate_up_proj = Linear(hidden, 2 * middle, dtype, bias=mlp_bias, widths=(middle, middle))
        self.mlp.down_proj = Linear(middle, hidden, dtype, bias=mlp_bias)

    def forward(self, x: Tensor, turned: tuple[Tensor, Tensor], sequence: Text) -> Tensor:
        new = len(x)
        qkv = self.self_attn.qkv_proj(self.input_layernorm(x)).view(new, -1, self.head_dim)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], 1)
        keys, values = sequence.append(self.number, _rotate(k, turned), v)
        q, group = _rotate(q, turned), self.heads // self.kv_heads
        scores = torch.einsum("nhd,thd->hnt", q.float(), keys.float().repeat_interleave(group, 1))
        later = torch.ones(new, len(keys), dtype=torch.bool, device=x.device).triu(len(keys) - new + 1)
        weights = (scores * self.head_dim**-0.5).masked_fill(later, -math.inf).softmax(-1)
        seen = torch.einsum("hnt,thd->nhd", weights, values.float().repeat_interleave(group, 1)).to(x.dtype)
        x = x + self.self_attn.o_proj(seen.flatten(1))
        gate, up = self.mlp.gate_up_proj(self.post_attention_layernorm(x)).chunk(2, -1)
        return x + self.mlp.down_proj(F.silu(gate) * up)


def _rotate(x: Tensor, turned: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = (part[:, None].to(x.dtype) for part in turned)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Model(nn.Module):
    """LlamaForCausalLM and Qwen2ForCausalLM in model_executor/models/."""

    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype, max_model_len: int) -> None:
        super().__init__()
        if config.model_type not in _MODELS:
            raise NotImplementedError(f"the stand-in has no model for {config.model_type}")
        self.config, self.dtype = config, dtype
        # ModelConfig.head_dtype in config/model.py
        self.head_dtype = getattr(torch, getattr(config, "head_dtype", None) or str(dtype).removeprefix("torch."))
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        rows = -(-config.vocab_size // _VOCABULARY) * _VOCABULARY
        self.model = nn.Module()
        self.model.embed_tokens = Linear(config.hidden_size, rows, dtype)
        self.model.layers = nn.ModuleList(
            Layer(config, number, self.head_dim, dtype) for number in range(config.num_hidden_layers)
        )
        self.model.norm = Norm(config.hidden_size, config.rms_norm_eps, dtype)
        self.lm_head = self.model.embed_tokens
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, rows, dtype)
        # RotaryEmbeddingBase in model_executor/layers/rotary_embedding/base.py: a buffer that no file holds.
        cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1, dtype=dtype), torch.arange(max_model_len)[None])
        half = self.head_dim // 2
        both = torch.stack([cos[0, :, :half], sin[0, :, :half]]).to("cuda")
        self.register_buffer("cos_sin_cache", both, persistent=False)

    def load(self, folder: Path) -> None:
        """The weights of a model directory, each where vLLM has it."""
        stored: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            stored |= load_file(file)
        for name, parameter in self.named_parameters():
            *prefix, module, kind = name.split(".")
            parts = [".".join([*prefix, part, kind]) for part in self.packed_modules_mapping.get(module, [module])]
            whole = torch.cat([stored[part] for part in parts])
            parameter[: len(whole)].copy_(whole)

    def forward(self, tokens: list[int], sequence: Text) -> Tensor:
        """[vocabulary]: logits after the last of the tokens, of which those behind sequence.computed are computed."""
        sequence.extend(len(tokens))
        x = F.embedding(torch.tensor(tokens[sequence.computed :], device="cuda"), self.model.embed_tokens.weight)
        cos, sin = self.cos_sin_cache[:, sequence.computed : len(tokens)]
        for layer in self.model.layers:
            x = layer(x, (cos, sin), sequence)
        sequence.computed = len(tokens)
        # LogitsProcessor._apply_head() in model_executor/layers/logits_processor.py; padding is cut off there, too.
        last = self.model.norm(x[-1:]).to(self.head_dtype)
        return F.linear(last, self.lm_head.weight.to(self.head_dtype))[0, : self.config.vocab_size]
