"""The settings of `rollout`: one class for each engine."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, field_validator

from gadcore.config.kinds import NonNegative, Positive, Section, named_object

# The kind of rollout.engine = "module:class".
OWN = "own"


def kind_of_engine(engine: Any) -> Any:
    """The tag of the settings that go with an engine: OWN for one that is named as "module:class"."""
    return OWN if isinstance(engine, str) and ":" in engine else engine


def _engine_of(value: Any) -> Any:
    return kind_of_engine(value.get("engine", "vllm") if isinstance(value, dict) else getattr(value, "engine", None))


# Annotates a union of Sections that differ by their `engine`; a table without one means vllm.
BY_ENGINE = Discriminator(_engine_of)


class CommonRollout(Section):
    """Sampling, with any engine."""

    engine: str
    group_size: Annotated[int, Field(gt=0, le=4096)] = Field(8, description="N, samples per prompt.")
    temperature: Annotated[float, Field(gt=0)] = 0.8
    context_tokens: Positive | None = Field(None, description="Of the engine; default prompt + response limits.")
    probe_every: NonNegative = Field(
        10,
        description="Syncs from one to the next whose samples the trainer scores itself, the first one's too, to prove "
        "that the engine has its weights; 0: none. For engines with weights of their own.",
    )
    parts: Positive = Field(
        1,
        description="Of a batch: the discriminator begins with the first one while the others are sampled; needs a "
        "sampler with devices of its own.",
    )
    ahead: Annotated[int, Field(ge=0, le=1)] = Field(
        0,
        description="1: the next batch is sampled while this one is learned from, with the weights from before this "
        "step's update; needs algorithm.importance_cap, and a sampler with devices of its own. 0: never.",
    )
    ahead_by_turns: bool = Field(
        False,
        description="true: rollout.ahead = 1 with a sampler on the trainer's devices too, where nothing is faster for "
        "it: to see what samples one step old cost.",
    )

    def check(self, importance_cap: float | None) -> None:
        """Raises ValueError where samples would be learned from as if they were of other weights, or come in no order.

        importance_cap: of the algorithm.
        """
        if self.ahead and importance_cap is None:
            raise ValueError(
                "rollout.ahead = 1 learns from samples of the weights before the last update, which only importance "
                "weights set right: set algorithm.importance_cap, for example to 2, or rollout.ahead = 0"
            )
        if self.ahead and self.parts > 1:
            raise ValueError(
                f"rollout.ahead = 1 has a batch before its step begins, rollout.parts = {self.parts} waits for it part "
                "by part: leave one of them out"
            )


class VLLMSettings(CommonRollout):
    """What both ways to run vLLM have."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    head_dtype: Literal["float32", "bfloat16"] = Field("float32", description="Of the logits, where dtype is bfloat16.")
    block_size: Positive = 32
    max_num_seqs: Positive | None = Field(
        None, description="Sequences at a time; none: 1024 on CUDA from 70 GiB on (an A100: 256), else 256."
    )
    prefix_caching: bool = True
    enforce_eager: bool | None = Field(None, description="none: CUDA graphs on CUDA, no graphs on a CPU; true: none.")
    batch_invariant: bool = Field(
        False, description="On CUDA: a prompt's samples depend on its seed alone, not on the batch; slower."
    )
    tensor_parallel: Positive = Field(
        1,
        description="Of the processes that train together, as many share the weights of one sampler; 1 where the "
        "student has an adapter.",
    )
    kv_cache_gib: Positive = Field(1, description="Memory of vLLM's KV cache, on a CPU.")
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.45, description="Share of the device's memory that vLLM may take, on CUDA."
    )

    def eager(self, device: str) -> bool:
        """Whether vLLM runs without graphs on a device of type "cpu" or "cuda"."""
        return device == "cpu" if self.enforce_eager is None else self.enforce_eager

    def sequences_at_once(self, device: str, memory_bytes: float, name: str) -> int:
        """Sequences that vLLM works on at a time, at most, on a device of that type, memory and name."""
        if self.max_num_seqs is not None:
            return self.max_num_seqs
        # As vLLM 0.32 has it where it is not told: EngineArgs.get_batch_defaults() in vllm/engine/arg_utils.py.
        large = memory_bytes >= 160 * 2**30 or (memory_bytes >= 70 * 2**30 and "a100" not in name.lower())
        return 1024 if device == "cuda" and large else 256


class VLLMRollout(VLLMSettings):
    """Sampling by vLLM in the trainer's processes: many prompts at a time, with weights and a KV cache of its own."""

    engine: Literal["vllm"] = Field(
        "vllm",
        description='Or "vllm-server", or "hf", which has only the settings of every engine, or "module:class", an '
        "engine of your own (docs/guide/extend.md).",
    )


class VLLMServerRollout(VLLMSettings):
    """Sampling by a vLLM server, which gets the weights over vLLM's weight transfer."""

    engine: Literal["vllm-server"] = "vllm-server"
    url: Annotated[str, Field(pattern=r"^https?://[^/\s]+/?$")] | None = Field(
        None, description="Of a server that is running, for example http://127.0.0.1:8000; none: one is started here."
    )
    token_env: str = Field("GADCORE_SERVER_TOKEN", description="Environment variable that holds the server's token.")
    transfer: Literal["auto", "memory", "ipc", "nccl"] = Field(
        "auto",
        description="How weights travel. memory: shared, on one machine's CPU; ipc: on the same GPUs; nccl: to others; "
        "auto: the one that fits.",
    )
    wait_s: Positive = Field(
        300, description="Seconds for a server to start, or to come back; below distributed.timeout_s."
    )
    answer_s: Positive = Field(3600, description="Seconds for one answer of the server.")


class HFRollout(CommonRollout):
    """Sampling by Hugging Face's generate, from the trainer's own weights, prompt by prompt."""

    engine: Literal["hf"] = Field("hf", description='Or "vllm" and "vllm-server", which have more settings.')


class OwnRollout(CommonRollout):
    """Sampling by an engine of one's own: a class on gadcore.rollout.engine.Engine, as "module:class"."""

    engine: str = Field(OWN, validate_default=True)

    @field_validator("engine")
    @classmethod
    def _module_and_class(cls, name: str) -> str:
        return named_object(name, "rollout.engine", "class", "my_engines:GreedyEngine")
