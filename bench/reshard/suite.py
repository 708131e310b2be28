"""Plans from FSDP's shards to vLLM's, for models of known sizes on the meta device.

Every plan is checked element by element in intervals: each engine's parameters are tiled once by its pieces, and each
piece lies in the rows of the rank that it is taken from. Bytes are counted beside the least that is possible and beside
gathering the whole model; seconds to plan are a core's of this machine, seconds of a sync on H100s predicted.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoConfig, Gemma3TextConfig, PreTrainedConfig, Qwen3Config

from bench import record
from gadcore.distributed.reshard import Layout, Mesh, all_pieces
from gadcore.distributed.reshard_blocks import Block, check_covered
from gadcore.errors import UserError
from gadcore.plan.dimensions import find_config
from gadcore.plan.machine import h100
from gadcore.plan.resharding import resharding
from gadcore.rollout.vllm_layout import layouts

DEGREES = (1, 2, 4, 8)
SHARDS = (8, 16)
KNOWN = (
    "Qwen/Qwen2.5-3B-Instruct",
    "Qwen/Qwen2.5-7B-Instruct",
    "Qwen/Qwen2.5-14B-Instruct",
    "meta-llama/Llama-3.2-3B-Instruct",
    "meta-llama/Llama-3.1-8B-Instruct",
)
# By their published sizes.
SIZES: dict[str, PreTrainedConfig] = {
    "Qwen/Qwen3-8B": Qwen3Config(
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        tie_word_embeddings=False,
        architectures=["Qwen3ForCausalLM"],
    ),
    "google/gemma-3-12b (text)": Gemma3TextConfig(
        hidden_size=3840,
        intermediate_size=15360,
        num_hidden_layers=48,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
        vocab_size=262208,
        architectures=["Gemma3ForCausalLM"],
    ),
}


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["model"], row["ranks"], row["replicas"], row["tensor_parallel"]


def run(quick: bool) -> Iterator[dict[str, Any]]:
    """A row a plan. quick: the smallest model on 8 ranks."""
    names = ["meta-llama/Llama-3.2-3B-Instruct"] if quick else [*KNOWN, *SIZES]
    meshes = [Mesh.even(shards) for shards in SHARDS] + [Mesh.even(8, replicas=2)]
    for name in names:
        with TemporaryDirectory() as folder:
            _config(name).save_pretrained(folder)
            for degree in DEGREES:
                record.say(f"{name}, tensor parallel {degree}")
                yield from _rows(name, folder, meshes[: 1 if quick else None], degree)


def _config(name: str) -> PreTrainedConfig:
    return SIZES[name] if name in SIZES else AutoConfig.from_pretrained(find_config(name))


def _rows(name: str, folder: str, meshes: list[Mesh], degree: int) -> Iterator[dict[str, Any]]:
    """Of every mesh of the trainer: the layout of the engine's ranks is the same."""
    start = time.process_time()
    refused, asked = "", None
    try:
        ((_, asked),) = layouts(folder, meshes[0], [degree], trainer=torch.float32, engine=torch.bfloat16)
    except UserError as error:
        said = re.search(r"Total number of \w+ heads \(\d+\) must be divisible by [\w ]+ \(\d+\)", str(error))
        refused = said[0] if said else str(error)
    asked_s = time.process_time() - start
    for mesh in meshes:
        about = {"model": name, "ranks": mesh.size, "replicas": len(mesh.ranks), "tensor_parallel": degree}
        if asked is None:
            yield {**about, "refused": refused}
            continue
        blocks = [asked.blocks[rank % degree] for rank in range(mesh.size)]
        layout = replace(asked, mesh=mesh, blocks=blocks)
        # Two nodes of eight where there are sixteen.
        found = resharding(layout, degree, h100(max(1, mesh.size // 8), 8, "H100"))
        wrong = mistakes(layout)
        yield {
            **about,
            "parameters": sum(torch.Size(shape).numel() for shape in layout.shapes.values()),
            "tied": "lm_head.weight" not in layout.shapes,
            "blocks": sum(map(len, layout.blocks[:degree])),
            "ask_s": asked_s,
            **{k: v for k, v in vars(found).items() if k not in ("ranks", "tensor_parallel")},
            "predicted_s": found.seconds,
            "gate": "fail" if wrong or found.received != found.minimum else "pass",
            "mistakes": wrong,
        }


def mistakes(layout: Layout) -> list[str]:
    """What is wrong with a layout's plan; nothing, where each element of each engine arrives once, from its owner."""
    found = []
    arriving: list[list[Block]] = [[] for _ in layout.blocks]
    holders = layout.mesh.replica_of()
    for piece in all_pieces(layout):
        b, chunk = piece.block, layout.mesh.chunk(layout.shapes[piece.block.source][0])
        arriving[piece.target].append(b)
        first, last = b.source_row // chunk, (b.source_row + b.rows - 1) // chunk
        if first != last or holders[piece.target][first] != piece.source:
            found.append(f"rank {piece.target}: {b.source} of rank {piece.source} is another's")
    for rank, (blocks, arrived) in enumerate(zip(layout.blocks, arriving, strict=True)):
        # Without rows at the end that no weight has: find_blocks() has seen that they are constant.
        shapes = {b.target: (0, 0) for b in blocks}
        for b in blocks:
            rows, columns = shapes[b.target]
            shapes[b.target] = (max(rows, b.row + b.rows), max(columns, b.column + b.columns))
        try:
            check_covered(shapes, arrived)
        except RuntimeError as error:
            found.append(f"rank {rank}: {error}")
    return found
