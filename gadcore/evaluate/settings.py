"""Settings of `python -m gadcore.run eval`. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, Tag, field_validator, model_validator

from gadcore.config.data import DataSettings
from gadcore.config.effects import Reason, of_vllm, told
from gadcore.config.kinds import Columns, Location, NonNegative, Positive, Rate, Section, pairs
from gadcore.config.rollout import BY_ENGINE, HFRollout, VLLMRollout
from gadcore.config.settings import Config, DiscriminatorSettings, FreshSettings, RunSettings
from gadcore.config.template_arguments import TemplateArguments

# Column and file names beside the models' own.
_RESERVED = ("teacher",)


class SetSettings(Section):
    """One set of prompts with reference responses."""

    source: Location = Field(description="As data.train of a training run: file, directory, hub id (owner/name:split).")
    rows: Positive | None = Field(None, description="Use only the first rows; default eval.rows.")
    columns: Columns = Field(
        default_factory=dict,
        description="As data.columns of a training run; default: those of the runs, where the set has such columns.",
    )


class EvalSettings(Section):
    """What is compared on what. Tables may be written NAME=VALUE,NAME=VALUE.

    A set is a source, or a table {source = "..", rows = 500, columns = {prompt = "question"}}.
    """

    models: dict[str, Location] = Field(
        default_factory=dict,
        description="Run folders (their student), checkpoint folders or models; differences are to the first.",
    )
    in_domain: dict[str, SetSettings] = Field(default_factory=dict, description="Sets like the training data, by name.")
    out_of_domain: dict[str, SetSettings] = Field(default_factory=dict, description="Other sets, by name.")
    rows: Positive | None = Field(None, description="Use only the first rows of every set.")
    samples: Positive = Field(
        1,
        description="Responses to a prompt, by which every measure but the fresh discriminator and the judges is "
        "averaged; 8 tell models apart that 1 does not.",
    )
    out: Location = Field("runs/eval", description="Folder of responses, evaluation.md and evaluation.json.")
    resamples: Positive = Field(2000, description="Of the bootstrap that the intervals come from.")

    @field_validator("models", mode="before")
    @classmethod
    def _models(cls, value: Any) -> Any:
        return pairs(value, "eval.models") if isinstance(value, str) else value

    @field_validator("in_domain", "out_of_domain", mode="before")
    @classmethod
    def _sets(cls, value: Any) -> Any:
        table = pairs(value, "eval.in_domain, eval.out_of_domain") if isinstance(value, str) else value
        if not isinstance(table, dict):
            return table
        return {name: {"source": item} if isinstance(item, str) else item for name, item in table.items()}

    @model_validator(mode="after")
    def _names(self) -> EvalSettings:
        if twice := self.in_domain.keys() & self.out_of_domain.keys():
            raise ValueError(f"eval.in_domain and eval.out_of_domain share the name {min(twice)}")
        for name in (*self.models, *self.in_domain, *self.out_of_domain):
            # They become names of files and folders.
            if not re.fullmatch(r"\w[\w.+-]*", name):
                raise ValueError(f"{name!r} is no name for a model or set: use letters, digits and _ . + -")
        for name in self.models:
            if name in _RESERVED or re.match(r"(judge|compare|fresh|sampled)-", name):
                raise ValueError(
                    f"eval.models must not use the name {name}: it stands for something else in the results"
                )
        return self


class MachineSettings(Section):
    """Where it is computed, and the seed of the responses."""

    device: str = Field("auto", description='"auto": cuda where there is one, else cpu; or a torch device.')
    threads: NonNegative = Field(0, description="CPU threads; 0: what the environment says.")
    seed: NonNegative = 0


class LimitSettings(Section):
    """Templates and limits, as those of a training run. What is not chosen is as in the runs that are evaluated."""

    system_prompt: str | None = Field(None, description="Put before conversations that have no system message.")
    template_arguments: TemplateArguments = Field(
        default_factory=dict, description="As those of a training run, for all models."
    )
    max_prompt_tokens: Positive = 2048
    max_response_tokens: Positive = Field(1536, description="Longer references are cut there, as responses are.")
    long_prompt: Literal["truncate", "drop", "error"] = Field(
        "truncate", description="truncate cuts inside the last user text; every such row is counted and reported."
    )
    reasoning: Literal["keep", "strip", "error"] = Field(
        "keep", description="Blocks of reasoning (<think>) of references and responses: kept, taken off, or refused."
    )


class CommonSampling(Section):
    """How responses are drawn, with any engine."""

    engine: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    temperature: Rate = Field(0.8, description="0: greedy.")


class VLLMSampling(CommonSampling):
    """How vLLM draws responses."""

    engine: Literal["vllm"] = Field("vllm", description='Or "hf", which has only the settings of every engine.')
    max_num_seqs: Positive | None = Field(None, description="Sequences at a time; none: as in training.")
    batch_invariant: bool = Field(
        False, description="On CUDA: equal models give equal responses, whatever else is in the batch; slower."
    )
    kv_cache_gib: Positive = Field(1, description="Memory of vLLM's KV cache, on a CPU.")
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.45, description="Share of the device's memory that vLLM may take, on CUDA."
    )

    def rollout(self) -> VLLMRollout:
        return VLLMRollout(**self.model_dump(exclude={"temperature"}))


class HFSampling(CommonSampling):
    """How Hugging Face's generate draws responses."""

    engine: Literal["hf"] = Field("hf", description='Or "vllm", which has more settings.')

    def rollout(self) -> HFRollout:
        return HFRollout()


class FreshModelSettings(FreshSettings):
    """The fresh discriminator of `eval`."""

    enabled: bool = Field(True, description="false: leaves this test out.")
    model: Location | None = Field(None, description="Its weights before training; default: those of the first model.")
    lr: Rate = 1e-5
    grad_clip: Annotated[float, Field(gt=0)] = 1.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    autocast: Literal["none", "bfloat16"] = "none"
    micro_batch_tokens: Positive = Field(16384, description="Packed tokens per forward pass.")

    def discriminator(self) -> DiscriminatorSettings:
        return DiscriminatorSettings(dtype=self.dtype, autocast=self.autocast, lr=self.lr, grad_clip=self.grad_clip)


class EvalConfig(Section):
    """Samples from models on held-out rows, beside the teacher's responses and with figures of each."""

    model_config = ConfigDict(title="eval")
    instead: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("data.columns", "data.eval_columns"),
        "a set has columns of its own, --eval.in_domain "
        """'{NAME = {source = "FILE", columns = {prompt = "COLUMN", teacher_response = "COLUMN"}}}', """
        "or is read by data.columns of the runs",
    )

    eval: EvalSettings = EvalSettings()
    run: MachineSettings = MachineSettings()
    data: LimitSettings = LimitSettings()
    sampling: Annotated[Annotated[VLLMSampling, Tag("vllm")] | Annotated[HFSampling, Tag("hf")], BY_ENGINE] = (
        VLLMSampling()
    )
    fresh: FreshModelSettings = FreshModelSettings()

    def without_effect(self, device: str) -> list[str]:
        """A sentence for every reason why settings have no effect that were chosen; device: "cpu" or "cuda"."""
        return told(self, self._reasons(device))

    def _reasons(self, device: str) -> Iterator[Reason]:
        yield from of_vllm("sampling", self.sampling.engine, device)
        if not self.fresh.enabled:
            names = (name for name in FreshModelSettings.model_fields if name != "enabled")
            yield "fresh.enabled is false", tuple(f"fresh.{name}" for name in names)
        sets = [*self.eval.in_domain.values(), *self.eval.out_of_domain.values()]
        if all(chosen.rows is not None for chosen in sets):
            yield "every set has rows of its own", ("eval.rows",)

    def as_run(self) -> Config:
        """The settings that are a training run's too, as such: limits, device, engine."""
        return Config(
            run=RunSettings(**self.run.model_dump()),
            data=DataSettings(**self.data.model_dump()),
            rollout=self.sampling.rollout(),
        )
