"""Stage 5: the sampler inside a training process: seconds to make, wake, update, fingerprint and put to sleep, and
tokens a second with 256 and 1,024 sequences at once, eager (stage `eager`) or with CUDA graphs (stage `graphs`).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bench.gpu.models import QWEN_3B, TINY, fewer_layers, save_random, token_groups
from bench.gpu.place import Place, Row, attempt, gate, installed, missing
from gadcore.config.settings import Config
from gadcore.data.template import ChatTemplate
from gadcore.models.loading import load_causal_lm, load_tokenizer
from gadcore.rollout.engine import Engine, SampleRequest, make_engine
from gadcore.rollout.weights import PlainWeights, checksums

SEQUENCES = (256, 1024)
SAMPLES = 8
# Of vLLM alone, and of trainer and vLLM together, bytes a parameter.
SHARE, BYTES_A_PARAMETER = 0.45, 10


def eager(place: Place) -> Iterator[Row]:
    yield from rows(place, graphs=False)


def graphs(place: Place) -> Iterator[Row]:
    yield from rows(place, graphs=True)


def rows(place: Place, *, graphs: bool) -> Iterator[Row]:
    """In a rehearsal Hugging Face's engine stands in, which has nothing to sleep or to capture."""
    if place.on_gpu and not installed("vllm"):
        yield missing("engine", "vllm")
        return
    shape = TINY if place.tiny else fewer_layers(QWEN_3B, SHARE * place.memory / BYTES_A_PARAMETER)
    prompt, response = (8, 4) if place.tiny else (300, 256)
    counts = (4, 8) if place.tiny else SEQUENCES
    settings = config(prompt, response, max(counts), graphs, place)
    made: dict[str, Any] = {}
    with TemporaryDirectory(dir=_room()) as folder:
        dtype = torch.bfloat16 if place.on_gpu else torch.float32
        path = save_random(shape, Path(folder) / "student", place.device, dtype)
        place.give_back()
        yield attempt("engine", lambda: _make(path, settings, made, place), place)
        engine: Engine | None = made.get("engine")
        if engine is None:
            return
        yield attempt("sleep and wake", lambda: _round(engine, made["model"], place), place)
        for count in counts:
            groups = token_groups(shape["vocab_size"], count // SAMPLES or 1, prompt, response, SAMPLES)
            asked = [SampleRequest(group.prompt.token_ids, min(SAMPLES, count), group.prompt.index) for group in groups]
            yield attempt(
                f"{count} sequences", partial(_generate, engine, made["model"], asked, response, place), place
            )
        engine.close()


def _room() -> str | None:
    """Shared memory, where it holds a model: written and read faster than a disk."""
    path = Path("/dev/shm")
    return str(path) if path.is_dir() and shutil.disk_usage(path).free > 16e9 else None


def config(prompt: int, response: int, sequences: int, graphs: bool, place: Place) -> Config:
    rollout: dict[str, Any] = {"engine": "hf", "group_size": SAMPLES, "temperature": 0.8}
    if place.on_gpu:
        rollout |= {
            "engine": "vllm",
            "dtype": "bfloat16",
            "enforce_eager": not graphs,
            "max_num_seqs": sequences,
            "gpu_memory_utilization": SHARE,
        }
    return Config.model_validate(
        {"data": {"max_prompt_tokens": prompt, "max_response_tokens": response}, "rollout": rollout}
    )


def _make(path: str, settings: Config, made: dict[str, Any], place: Place) -> Row:
    """The trainer's model in float32, and an engine for it."""
    made["model"] = load_causal_lm(path, "float32", place.device)
    template = ChatTemplate(load_tokenizer(path))
    made_s = place.seconds(lambda: made.update(engine=make_engine(settings, path, made["model"], template)))
    return {"make_s": made_s, "parameters": sum(p.numel() for p in made["model"].parameters())}


def _round(engine: Engine, model: Any, place: Place) -> Row:
    """Two turns, the second of which counts; every part apart, with the bytes of the device in between."""
    found: Row = {}
    for _ in range(2):
        before = _used(place)
        found = {"wake_weights_s": place.seconds(lambda: engine.wake("weights"))}
        found["update_s"] = place.seconds(lambda: engine.update_weights(PlainWeights(model)))
        found["fingerprint_s"] = place.seconds(lambda: checksums(engine.weights().items()))
        found["wake_kv_cache_s"] = place.seconds(lambda: engine.wake("kv_cache"))
        awake, held = _used(place), sum(engine.held().values())
        found["sleep_s"] = place.seconds(engine.sleep)
        asleep = _used(place)
        found |= {"held_bytes": held, "freed_bytes": awake - asleep, "kept_asleep_bytes": asleep - before}
    # What it says that it held is what the device has again; its buffers and graphs stay.
    if place.on_gpu:
        found["gate"] = gate(abs(found["freed_bytes"] - found["held_bytes"]) <= 0.1 * found["held_bytes"])
    return found


def _used(place: Place) -> int:
    if not place.on_gpu:
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


def _generate(engine: Engine, model: Any, asked: list[SampleRequest], tokens: int, place: Place) -> Row:
    """Tokens a second of a draw; one short draw before it, which compiles."""
    engine.wake("weights")
    engine.update_weights(PlainWeights(model))
    engine.wake("kv_cache")
    engine.generate(asked[:1], temperature=0.8, max_tokens=2)
    drawn: list[int] = []

    def draw() -> None:
        for group in engine.generate(asked, temperature=0.8, max_tokens=tokens):
            drawn.extend(len(response.token_ids) for response in group)

    seconds = place.seconds(draw)
    return {"sequences": len(drawn), "tokens": sum(drawn), "generate_s": seconds, "tokens_per_s": sum(drawn) / seconds}
