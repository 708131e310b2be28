"""Every setting of a run, validated. Imports no torch, so that a wrong setting is told in a second.

Order of precedence: the defaults below (the paper's settings), then the TOML file or preset, then `--dotted.key value`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RunSettings(Section):
    """Where the run lives and how it starts."""

    name: str = "gad"
    dir: str | None = Field(None, description="Run folder; default runs/<name>-<date>-<time>.")
    seed: NonNegative = 0
    resume: Literal["auto"] | None = Field(
        None, description='"auto": go on from the newest checkpoint of the run folder.'
    )
    device: str = Field("auto", description='"auto": cuda where there is one, else cpu; or a torch device.')
    threads: NonNegative = Field(0, description="CPU threads; 0: what the environment says.")


class DataSettings(Section):
    """Rows, templates and limits."""

    train: str = Field("house", description="File (.jsonl, .jsonl.gz, .parquet), directory, hub id, or 'house'.")
    eval: str | None = Field("house", description='Held-out rows, in the same forms; "none": no evaluation.')
    columns: dict[str, str] = Field(
        default_factory=dict, description="Column map, for example {prompt = 'question', teacher_response = 'answer'}."
    )
    system_prompt: str | None = Field(None, description="Put before conversations that have no system message.")
    max_prompt_tokens: Positive = 2048
    max_response_tokens: Positive = 1536
    long_prompt: Literal["truncate", "drop", "error"] = Field(
        "truncate", description="truncate cuts inside the last user text; every such row is counted and reported."
    )
    long_response: Literal["cut", "drop", "error"] = Field(
        "cut",
        description="A longer teacher response is cut, as a student's sample would be, dropped, or refused.",
    )
    train_rows: Positive | None = Field(None, description="Use only the first rows of the training set.")
    eval_rows: Positive | None = Field(None, description="Use only the first rows of the held-out set.")


class StudentSettings(Section):
    """The model that learns."""

    model: str = "smollm2-135m-instruct"
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Of the parameters and the optimizer.")
    autocast: Literal["none", "bfloat16"] = Field("none", description="Of the products inside forward and backward.")
    lr: Rate = Field(1e-6, description="Of the GAD stage.")
    warmup_lr: Rate = Field(1e-6, description="Of the warmup's cross-entropy.")
    seqkd_lr: Rate = Field(5e-6, description="Of the baseline `seqkd`.")
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: Rate = 0.01
    grad_clip: Annotated[float, Field(gt=0)] = 0.2


class DiscriminatorSettings(Section):
    """The model that judges; "student" means initialised from the student's own weights."""

    model: str = "student"
    dtype: Literal["float32", "bfloat16"] = "float32"
    autocast: Literal["none", "bfloat16"] = "none"
    lr: Rate = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: Rate = 0.01
    grad_clip: Annotated[float, Field(gt=0)] = 0.2


class RolloutSettings(Section):
    """Sampling."""

    engine: Literal["vllm", "hf"] = "vllm"
    dtype: Literal["float32", "bfloat16"] = "float32"
    group_size: Positive = Field(8, description="N, samples per prompt.")
    temperature: Annotated[float, Field(gt=0)] = 0.8
    context_tokens: Positive | None = Field(None, description="Of the engine; default prompt + response limits.")
    block_size: Positive = 32
    max_num_seqs: Positive = 256
    prefix_caching: bool = True
    kv_cache_gib: Positive = Field(1, description="Memory of vLLM's KV cache on the CPU.")
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] = 0.45
    enforce_eager: bool = True


class AlgorithmSettings(Section):
    """What is optimised (DESIGN, section 1)."""

    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    clip_high: Annotated[float, Field(gt=0)] = 0.2
    kl_coef: Rate = 0.001
    normalise_advantage: bool = Field(True, description="Divide advantages by the group's standard deviation.")
    sft_temperature: Annotated[float, Field(gt=0)] = 1.0
    critic_warmup: NonNegative = Field(0, description="First steps of the warmup that update only the discriminator.")


class ScheduleSettings(Section):
    """How long each stage lasts."""

    batch_size: Positive = Field(256, description="Prompts per step.")
    warmup_epochs: NonNegative = 1
    gad_epochs: NonNegative = 2
    seqkd_epochs: NonNegative = Field(3, description="Of the baseline `seqkd`.")
    warmup_steps: NonNegative | None = Field(None, description="Upper limit on steps of the warmup.")
    gad_steps: NonNegative | None = Field(None, description="Upper limit on steps of the GAD stage.")
    seqkd_steps: NonNegative | None = Field(None, description="Upper limit on steps of the baseline.")
    micro_batch_tokens: Positive = Field(16384, description="Packed tokens per forward pass.")
    activation_checkpointing: Literal["auto", "off", "selective", "full"] = Field(
        "auto", description="What backward computes again to save memory; auto: the least that fits."
    )


class CheckpointSettings(Section):
    """Saving and going on."""

    every: NonNegative = Field(50, description="Steps between checkpoints; 0: only when interrupted.")
    keep: Positive = 2


class TrackingSettings(Section):
    """metrics.jsonl is always written; a tracker comes on top."""

    tracker: Literal["none", "tensorboard", "wandb", "trackio", "mlflow"] = "none"
    project: str = "gadcore"
    view: Literal["auto", "live", "plain"] = Field("auto", description="auto: live in a terminal, else plain lines.")
    sample_every: NonNegative = Field(5, description="Steps between printed sample triplets; 0: never.")


class Config(Section):
    """All settings of `python -m gadcore.run`."""

    run: RunSettings = RunSettings()
    data: DataSettings = DataSettings()
    student: StudentSettings = StudentSettings()
    discriminator: DiscriminatorSettings = DiscriminatorSettings()
    rollout: RolloutSettings = RolloutSettings()
    algorithm: AlgorithmSettings = AlgorithmSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    tracking: TrackingSettings = TrackingSettings()

    @property
    def context_tokens(self) -> int:
        """Tokens that the sampler's context holds."""
        return self.rollout.context_tokens or self.data.max_prompt_tokens + self.data.max_response_tokens

    def started_new(self) -> Config:
        """These settings as a run folder keeps them: to start a run with, not to resume this one."""
        return self.model_copy(update={"run": self.run.model_copy(update={"resume": None, "dir": None})})

    @model_validator(mode="after")
    def _combinations(self) -> Config:
        if self.rollout.group_size == 1:
            raise ValueError(
                "rollout.group_size = 1 leaves no group to compare with: every advantage would be 0 (0 / 0 when "
                "algorithm.normalise_advantage is set): use 2 or more samples per prompt"
            )
        if self.data.max_prompt_tokens + self.data.max_response_tokens > self.context_tokens:
            raise ValueError(
                f"data.max_prompt_tokens = {self.data.max_prompt_tokens} and data.max_response_tokens = "
                f"{self.data.max_response_tokens} do not fit into rollout.context_tokens = {self.context_tokens}: "
                "lower the limits or raise the context"
            )
        return self
