"""Every setting of a run, validated. Imports no torch, so that a wrong setting is told in a second.

Order of precedence: the defaults below (the paper's settings), then the TOML file or preset, then `--dotted.key value`.
"""

from __future__ import annotations

import os
import re
from math import isfinite
from typing import Annotated, Literal

from pydantic import Field, Tag, ValidationInfo, field_validator, model_validator

from gadcore.config.adapter import Adaptable, check_adapter, check_sampler
from gadcore.config.curriculum import CurriculumSettings, GateSettings
from gadcore.config.data import SPLIT, DataSettings
from gadcore.config.distributed import DistributedSettings
from gadcore.config.kinds import (
    BUNDLED_MODEL,
    Above,
    Dtype,
    Location,
    Master,
    NonNegative,
    Positive,
    Rate,
    Section,
    anywhere,
    named_object,
)
from gadcore.config.rollout import BY_ENGINE, OWN, HFRollout, OwnRollout, VLLMRollout, VLLMServerRollout, VLLMSettings


class RunSettings(Section):
    """Where the run lives and how it starts."""

    name: str = "gad"
    dir: Location | None = Field(None, description="Run folder; default runs/<name>-<date>-<time>.")
    seed: NonNegative = 0
    resume: str | None = Field(
        None,
        description='"auto": go on from the newest checkpoint of the run folder; "step-000003": go back to that one, '
        "and set aside what came after it.",
    )
    device: str = Field("auto", description='"auto": cuda where there is one, else cpu; or a torch device.')
    threads: NonNegative = Field(0, description="CPU threads; 0: what the environment says.")

    @field_validator("name")
    @classmethod
    def _no_path(cls, name: str) -> str:
        if "/" in name or "\0" in name or name in ("", ".", "..") or len(name.encode(errors="replace")) > 200:
            raise ValueError(
                f"run.name = {name!r} cannot name a folder of runs/: give a short name without '/', and a path by "
                "run.dir"
            )
        return name

    @field_validator("resume")
    @classmethod
    def _resumed(cls, resume: str | None) -> str | None:
        if resume is not None and resume != "auto" and not re.fullmatch(r"step-\d{1,18}", resume, re.ASCII):
            raise ValueError(f"run.resume = {resume!r} must be auto or a checkpoint of the run, like step-000003")
        return resume


class StudentSettings(Adaptable):
    """The model that learns."""

    model: Location = BUNDLED_MODEL
    dtype: Dtype = Field("float32", description="Of what the optimizer updates, and of its moments.")
    autocast: Literal["none", "bfloat16"] = Field("none", description="Of the products inside forward and backward.")
    master: Master = "device"
    lr: Rate = Field(1e-6, description="Of the GAD stage.")
    warmup_lr: Rate = Field(1e-6, description="Of the warmup's cross-entropy.")
    seqkd_lr: Rate = Field(5e-6, description="Of the baseline `seqkd`.")
    soda_lr: Rate = Field(5e-7, description="Of the baseline `soda`.")
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: Rate = 0.01
    grad_clip: Annotated[float, Field(gt=0)] = 0.2


class DiscriminatorSettings(Adaptable):
    """The model that scores; "student" means initialised from the student's own weights."""

    model: Location = Field(
        "student", description="Of any size, family and vocabulary: text is all that it gets of the student's samples."
    )
    dtype: Dtype = "float32"
    autocast: Literal["none", "bfloat16"] = "none"
    master: Master = "device"
    lr: Rate = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: Rate = 0.01
    grad_clip: Annotated[float, Field(gt=0)] = 0.2
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0, description="e: the BT loss believes that the teacher's text is the better one with probability 1 - e."
    )
    margin_cap: Above | None = Field(
        None, description="A pair whose margin is above this gives no gradient; none: every pair does."
    )
    score_l2: Rate = Field(
        0.0, description="lambda: adds the mean over pairs of lambda (D(x, y_t)^2 + D(x, y_s)^2) to the loss."
    )


class AlgorithmSettings(Section):
    """What is optimised: the clipped GRPO loss with a KL penalty; D's scores are the rewards (arXiv 2511.10643)."""

    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    clip_high: Annotated[float, Field(gt=0)] = 0.2
    kl_coef: Rate = 0.001
    importance_cap: Annotated[float, Field(ge=1)] | None = Field(
        None,
        description="c: a token's policy gradient is weighed by min(p_trainer / p_sampler, c), against a sampler that "
        "computes otherwise than the trainer (kernels/grpo_ratio_loss.py); none: by 1.",
    )
    normalise_advantage: bool = Field(True, description="Divide advantages by the group's standard deviation.")
    sft_temperature: Annotated[float, Field(gt=0)] = 1.0
    critic_warmup: NonNegative = Field(0, description="First steps of the warmup that update only the discriminator.")
    student_warmup: bool = Field(True, description="false: the warmup leaves the student as it is.")
    discriminator_warmup: bool = Field(True, description="false: the warmup leaves the discriminator as it is.")
    freeze_discriminator: bool = Field(
        False, description="true: the GAD stage scores with the discriminator of the warmup and never updates it."
    )
    discriminator_steps: Positive = Field(
        1, description="Updates of the discriminator on every batch, of both stages; the reward is from before them."
    )
    discriminator_every: Positive = Field(
        1, description="Update the discriminator only in every k-th step, of both stages."
    )
    advantage_std_floor: Above = Field(1e-6, description="Added to the standard deviation that divides advantages.")
    score_clip: Above | None = Field(
        None, description="c: a reward differs from the teacher's score by this at most; none: by whatever it does."
    )
    length_debias: float | Literal["fit"] = Field(
        0.0,
        description='b: a reward is less by b log(1 + tokens of the sample); "fit": the b that leaves the rewards of a '
        "batch no trend in the length.",
    )
    soda_beta: Above = Field(
        0.1, description="Of the baseline `soda`: how strongly DPO holds the student to where it began."
    )
    soda_samples: Positive = Field(
        1, description="Of the baseline `soda`: samples of every row in the snapshot, each one a pair."
    )
    loss: str | None = Field(
        None, description='"module:function" in place of the clipped ratio loss (gadcore/models/policy_loss.py).'
    )
    reward: str | None = Field(
        None, description='"module:function" that makes rewards of D\'s scores and the texts (gadcore/train/reward.py).'
    )

    @field_validator("length_debias", mode="before")
    @classmethod
    def _number_or_fit(cls, value: object) -> object:
        if value != "fit" and not (isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)):
            raise ValueError(f'algorithm.length_debias = {value!r} must be a number or "fit"')
        return value

    @field_validator("loss", "reward")
    @classmethod
    def _module_and_function(cls, name: str | None, info: ValidationInfo) -> str | None:
        key = f"algorithm.{info.field_name}"
        return None if name is None else named_object(name, key, "function", "my_losses:reinforce")


class ScheduleSettings(Section):
    """How long each stage lasts."""

    batch_size: Positive = Field(256, description="Prompts per step.")
    sft_epochs: NonNegative = Field(
        0,
        description="Of cross-entropy alone before the warmup, at student.warmup_lr; nothing is sampled. The paper's "
        "student gets its cross-entropy in the warmup; with this, that may train the discriminator alone "
        "(algorithm.student_warmup).",
    )
    warmup_epochs: NonNegative = 1
    gad_epochs: NonNegative = 2
    seqkd_epochs: NonNegative = Field(3, description="Of the baseline `seqkd`.")
    soda_epochs: NonNegative = Field(1, description="Of the baseline `soda`.")
    sft_steps: NonNegative | None = Field(None, description="Upper limit on steps of cross-entropy alone.")
    warmup_steps: NonNegative | None = Field(None, description="Upper limit on steps of the warmup.")
    gad_steps: NonNegative | None = Field(None, description="Upper limit on steps of the GAD stage.")
    seqkd_steps: NonNegative | None = Field(None, description="Upper limit on steps of the baseline `seqkd`.")
    soda_steps: NonNegative | None = Field(None, description="Upper limit on steps of the baseline `soda`.")
    micro_batch_tokens: Positive = Field(16384, description="Packed tokens per forward pass.")
    activation_checkpointing: Literal["auto", "off", "selective", "full"] = Field(
        "auto", description="What backward computes again to save memory; auto: the least that fits."
    )

    @property
    def has_sft(self) -> bool:
        """Whether cross-entropy alone comes before the warmup."""
        return self.sft_epochs > 0 and self.sft_steps != 0


class ConvergenceSettings(Section):
    """When the GAD stage ends: a fresh discriminator, trained on some held-out pairs, is asked about the others."""

    enabled: bool = False
    every: Positive = Field(25, description="GAD steps between two measurements.")
    rows: Annotated[int, Field(ge=4)] = Field(128, description="Held-out prompts of a measurement, one sample each.")
    steps: Positive = Field(100, description="Updates of the fresh discriminator.")
    step_rows: Positive = Field(16, description="Prompts per update of the fresh discriminator.")
    cross_fit: bool = Field(
        True, description="Both halves of the prompts are trained on and scored, each by a fresh discriminator."
    )
    lr: Above = Field(1e-5, description="Of the fresh discriminator.")
    patience: Positive = Field(3, description="Measurements without a new minimum that are a plateau.")
    tolerance: Rate = Field(0.01, description="What a new minimum must be lower by.")
    rise: Above = Field(0.1, description="An accuracy this much above the minimum ends the stage at once.")


class FreshSettings(Section):
    """How long a fresh discriminator learns, and from what (gadcore.measure.fresh)."""

    steps: Positive = Field(40, description="Optimizer steps.")
    batch_size: Positive = Field(16, description="Prompts per step.")
    seed: NonNegative = Field(0, description="Of the halves, the order and the new head.")
    cross_fit: bool = Field(True, description="Both halves are trained on and scored, each by a discriminator anew.")


class MemorySettings(Section):
    """Who holds the device when (gadcore/memory/holdings.py)."""

    offload: Literal["auto", "none", "pinned", "file"] = Field(
        "auto",
        description="Where parameters and optimizer states wait while others compute: none: they stay; pinned: in "
        "page-locked memory of the host (CUDA); file: in files of memory.dir; auto: pinned on CUDA, else none.",
    )
    dir: Location | None = Field(None, description='Folder for offload = "file"; default: offload/ of the run folder.')
    shared_weights: bool = Field(
        True, description="One copy of the student's weights for trainer and vLLM, where both are on the CPU."
    )
    limit_gib: Above | None = Field(
        None, description="Ends the run with a list of the holders before more than this is held; none: the device's."
    )
    prefetch: bool = Field(True, description="Bring in what comes next while the present state computes, if it fits.")


class CheckpointSettings(Section):
    """Saving and going on."""

    every: NonNegative = Field(
        50,
        description="Steps between checkpoints; 0: only when interrupted, and at a minimum of convergence.*",
    )
    keep: Positive = 2
    asynchronous: bool = Field(
        False,
        description="Of several processes: write while the next batch is sampled, done before the next optimizer step.",
    )


class TrackingSettings(Section):
    """metrics.jsonl is always written; a tracker comes on top."""

    tracker: Literal["none", "tensorboard", "wandb", "trackio", "mlflow"] = "none"
    project: str = "gadcore"
    view: Literal["auto", "live", "plain"] = Field("auto", description="auto: live in a terminal, else plain lines.")
    sample_every: NonNegative = Field(5, description="Steps between printed sample triplets; 0: never.")
    monitor_interval: Rate = Field(
        1.0, description="Seconds between looks at CPU, GPU and memory (machine/* of metrics.jsonl); 0: none."
    )
    trace: bool = Field(False, description="Write trace.json, for ui.perfetto.dev.")


class Config(Section):
    """All settings of `python -m gadcore.run`."""

    run: RunSettings = RunSettings()
    data: DataSettings = DataSettings()
    student: StudentSettings = StudentSettings()
    discriminator: DiscriminatorSettings = DiscriminatorSettings()
    rollout: Annotated[
        Annotated[VLLMRollout, Tag("vllm")]
        | Annotated[VLLMServerRollout, Tag("vllm-server")]
        | Annotated[HFRollout, Tag("hf")]
        | Annotated[OwnRollout, Tag(OWN)],
        BY_ENGINE,
    ] = VLLMRollout()
    algorithm: AlgorithmSettings = AlgorithmSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    curriculum: CurriculumSettings = CurriculumSettings()
    gate: GateSettings = GateSettings()
    convergence: ConvergenceSettings = ConvergenceSettings()
    memory: MemorySettings = MemorySettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    tracking: TrackingSettings = TrackingSettings()
    distributed: DistributedSettings = DistributedSettings()

    @property
    def context_tokens(self) -> int:
        """Tokens that the sampler's context holds."""
        return self.rollout.context_tokens or self.data.max_prompt_tokens + self.data.max_response_tokens

    @property
    def vllm(self) -> VLLMSettings:
        """The settings of a run whose engine is vLLM; TypeError for another."""
        if not isinstance(self.rollout, VLLMSettings):
            raise TypeError(f"the engine is {self.rollout.engine}")
        return self.rollout

    @property
    def discriminator_model(self) -> str:
        """The model that the discriminator starts from."""
        name = self.discriminator.model
        return self.student.model if name == "student" else name

    def started_new(self) -> Config:
        """These settings as a run folder keeps them: to start a run with, from any directory."""
        run = {"resume": None, "dir": None}
        data = {"train": anywhere(self.data.train, "builtin"), "eval": anywhere(self.data.eval, "builtin", SPLIT)}
        discriminator = {"model": anywhere(self.discriminator.model, BUNDLED_MODEL, "student")}
        memory = {"dir": self.memory.dir and os.path.abspath(self.memory.dir)}
        student = {"model": anywhere(self.student.model, BUNDLED_MODEL)}
        for update, settings in ((student, self.student), (discriminator, self.discriminator)):
            update["adapter_from"] = anywhere(settings.adapter_from)
        return self.model_copy(
            update={
                "run": self.run.model_copy(update=run),
                "data": self.data.model_copy(update=data),
                "student": self.student.model_copy(update=student),
                "discriminator": self.discriminator.model_copy(update=discriminator),
                "memory": self.memory.model_copy(update=memory),
            }
        )

    @model_validator(mode="after")
    def _combinations(self) -> Config:
        if self.rollout.group_size == 1:
            raise ValueError(
                "rollout.group_size = 1 leaves no group to compare with: every advantage would be 0 (0 / 0 when "
                "algorithm.normalise_advantage is set): use 2 or more samples per prompt"
            )
        self.rollout.check(self.algorithm.importance_cap)
        self._ablations()
        for name in ("student", "discriminator"):
            trained = getattr(self, name)
            if trained.master == "host" and trained.dtype != "float32":
                raise ValueError(
                    f"{name}.master = host keeps float32 weights and moments, {name}.dtype = {trained.dtype} asks for "
                    "others: leave one of them out"
                )
            check_adapter(name, trained)
        rollout = self.rollout
        dtype, parallel = getattr(rollout, "dtype", "float32"), getattr(rollout, "tensor_parallel", 1)
        check_sampler(self.student, rollout.engine, dtype, parallel)
        for section in (self.gate, self.convergence):
            if section.enabled and self.data.eval is None:
                name = "gate" if section is self.gate else "convergence"
                raise ValueError(
                    f"{name}.enabled needs held-out prompts, data.eval has none: give some, or switch it off"
                )
        self.curriculum.check(held_out=self.data.eval is not None, discriminator=self.algorithm.discriminator_warmup)
        if self.gate.low >= self.gate.high:
            raise ValueError(
                f"gate.low = {self.gate.low} and gate.high = {self.gate.high} leave no accuracy between them: "
                "lower the first or raise the second"
            )
        if self.data.max_prompt_tokens + self.data.max_response_tokens > self.context_tokens:
            raise ValueError(
                f"data.max_prompt_tokens = {self.data.max_prompt_tokens} and data.max_response_tokens = "
                f"{self.data.max_response_tokens} do not fit into rollout.context_tokens = {self.context_tokens}: "
                "lower the limits or raise the context"
            )
        return self

    def _ablations(self) -> None:
        algorithm = self.algorithm
        if algorithm.discriminator_steps > 1 and algorithm.discriminator_every > 1:
            raise ValueError(
                f"algorithm.discriminator_steps = {algorithm.discriminator_steps} makes the discriminator faster and "
                f"algorithm.discriminator_every = {algorithm.discriminator_every} slower: leave one of them at 1"
            )
        if algorithm.critic_warmup and not algorithm.student_warmup:
            raise ValueError(
                f"algorithm.critic_warmup = {algorithm.critic_warmup} says when the student joins the warmup, and "
                "algorithm.student_warmup = false that it never does: set one of them back"
            )
        if algorithm.critic_warmup and not algorithm.discriminator_warmup:
            raise ValueError(
                f"the {algorithm.critic_warmup} steps of algorithm.critic_warmup would update nothing with "
                "algorithm.discriminator_warmup = false: set one of them back"
            )
        if self.gate.enabled and not algorithm.discriminator_warmup:
            raise ValueError(
                "gate.enabled asks for more warmup until the discriminator can tell, which "
                "algorithm.discriminator_warmup = false keeps from learning: set one of them back"
            )
