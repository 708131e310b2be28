"""Settings of `python -m gadcore.run serve-discriminator`. Imports no torch."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from gadcore.config.kinds import BUNDLED_MODEL, Above, Columns, Location, NonNegative, Positive, Rate, Section
from gadcore.config.settings import DiscriminatorSettings, MemorySettings
from gadcore.config.template_arguments import TemplateArguments


class ServedDiscriminator(DiscriminatorSettings):
    """The model that scores, and how it learns."""

    model: Location = Field(
        BUNDLED_MODEL, description="Directory (a run's discriminator/ goes on as it is), hub id or bundled name."
    )


class RowSettings(Section):
    """Rows that groups may name, and how prompts are rendered."""

    train: Location | None = Field(
        None, description="Rows with teacher responses, as data.train of a training run; groups name them by row."
    )
    columns: Columns = Field(default_factory=dict, description="As data.columns of a training run.")
    system_prompt: str | None = Field(None, description="Put before conversations that have no system message.")
    template_arguments: TemplateArguments = Field(
        default_factory=dict, description="What the chat template is rendered with, as in a training run."
    )


class ServiceSettings(Section):
    """Where it listens, how groups become updates, and what a request may ask for."""

    host: str = Field("127.0.0.1", description="Address to listen on; any but loopback needs a token.")
    port: Annotated[int, Field(ge=0, lt=2**16)] = Field(8640, description="0: any free one, which is printed.")
    token_variable: str = Field("GADCORE_TOKEN", description="Environment variable that holds the bearer token.")
    dir: Location = Field("runs/discriminator", description="Folder of journal and checkpoints; it goes on from there.")
    batch_groups: Positive = Field(1, description="Groups that make an update; a request's groups stay together.")
    batch_seconds: Rate = Field(2.0, description="An update waits so long at most for batch_groups groups.")
    micro_batch_tokens: Positive = Field(16384, description="Packed tokens per forward pass.")
    checkpoint_every: Positive = Field(100, description="Updates between checkpoints; a restart repeats those since.")
    keep: Positive = Field(2, description="Checkpoints of its own that are kept.")
    keep_saved: Positive = Field(3, description="Checkpoints that clients asked for that are kept.")
    keep_answers: Positive = Field(100_000, description="Requests whose answers a repetition gets again.")
    most_groups: Positive = Field(1024, description="Of a request.")
    most_samples: Positive = Field(256, description="Of a group.")
    most_characters: Positive = Field(200_000, description="Of a text: a message, a response, a sample.")
    most_body_mib: Above = Field(64.0, description="Of a request's body.")
    body_seconds: Above = Field(30.0, description="A request's body must have arrived by then.")
    waiting_groups: Positive = Field(4096, description="More groups than this do not wait: 429.")
    most_connections: Positive = Field(512, description="At a time.")
    warmup_samples: Location | None = Field(
        None, description='JSON lines {"row" or "prompt" and "teacher_response", "samples"}: D learns from them first.'
    )
    warmup_steps: NonNegative = Field(50, description="Updates on warmup_samples.")
    warmup_groups: Positive = Field(16, description="Groups of such an update.")

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


class ServiceMemory(Section):
    """Where the model waits while it sleeps, and its moments while it scores."""

    offload: Literal["auto", "none", "pinned", "file"] = Field(
        "auto", description="As memory.offload of a training run: auto: pinned on CUDA, else none."
    )
    dir: Location | None = Field(None, description='Folder for offload = "file"; default: offload/ of service.dir.')
    limit_gib: Above | None = Field(None, description="No update that holds more; none: no limit of its own.")

    def for_colocation(self) -> MemorySettings:
        """Nobody knows here what others hold of a shared device: without a limit there is none."""
        return MemorySettings(offload=self.offload, dir=self.dir, limit_gib=self.limit_gib or 2.0**20, prefetch=False)


class ServiceMachine(Section):
    """Where it is computed."""

    device: str = Field("auto", description='"auto": cuda where there is one, else cpu; or a torch device.')
    threads: NonNegative = Field(0, description="CPU threads; 0: what the environment says.")
    seed: NonNegative = Field(0, description="Of a fresh head, and of the warmup's order.")


class ServiceConfig(Section):
    """A discriminator that other trainers ask for rewards, and train, over HTTP."""

    model_config = ConfigDict(title="serve-discriminator")

    discriminator: ServedDiscriminator = ServedDiscriminator()
    data: RowSettings = RowSettings()
    service: ServiceSettings = ServiceSettings()
    memory: ServiceMemory = ServiceMemory()
    run: ServiceMachine = ServiceMachine()
