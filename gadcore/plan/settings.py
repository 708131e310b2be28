"""Settings of `python -m gadcore.run plan`. Imports no torch.

Everything about the run itself is set as for training: --preset, --config and --section.key.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, field_validator

from gadcore.config import loading
from gadcore.config.command_line import HELP
from gadcore.config.default_job import default_preset
from gadcore.config.kinds import Above, Location, Positive, Section
from gadcore.config.settings import Config
from gadcore.errors import UserError

AtLeastOne = Annotated[float, Field(ge=1)]


class PlanSettings(Section):
    """The machine, the data where it is not at hand, and what to assume."""

    machine: Location = Field(
        "here",
        description="here: this machine; h100-80gb-x1 .. h100-80gb-x8; 2x8-h100-80gb: 2 nodes of 8; rtx4090-24gb; or a "
        "TOML file.",
    )
    gpus: Positive | None = Field(
        None,
        description="Accelerators like plan.machine's, or H100 where it has none, up to 8 a node; default: its own.",
    )
    calibrate: bool = Field(False, description="Measure this machine first, within a minute, and keep the figures.")
    rows: Positive | None = Field(None, description="Training rows; default: those of the data.")
    prompt_tokens: AtLeastOne | None = Field(None, description="Mean tokens of a prompt; default: of the data.")
    response_tokens: AtLeastOne | None = Field(
        None, description="Mean of the student's samples; default: the teacher's."
    )
    teacher_tokens: AtLeastOne | None = Field(
        None, description="Mean of the teacher's responses; default: of the data."
    )
    assume: dict[str, Above] = Field(
        default_factory=dict, description="Figures in place of the printed assumptions: NAME=VALUE,NAME=VALUE."
    )
    check_activations: bool = Field(
        True, description="Run the real code on fake tensors and compare the activations that it keeps."
    )
    resharding: bool = Field(
        False,
        description="Of several ranks: ask vLLM for its layout at every size of tensor parallelism, and count what a "
        "sync of the weights moves.",
    )
    against: Location | None = Field(None, description="Run folder: set the prediction beside what that run measured.")
    out: Location | None = Field(None, description="File that gets everything as JSON.")

    @field_validator("assume", mode="before")
    @classmethod
    def _assume(cls, value: Any) -> Any:
        return _figures(value) if isinstance(value, str) else value


class PlanConfig(Section):
    """The settings of `python -m gadcore.run plan` beside those of the run, which are set as for training."""

    model_config = ConfigDict(title="plan")

    plan: PlanSettings = PlanSettings()


def _figures(text: str) -> dict[str, float]:
    figures: dict[str, float] = {}
    for item in text.split(","):
        name, _, figure = (part.strip() for part in item.partition("="))
        try:
            figures[name] = float(figure)
        except ValueError:
            raise ValueError(f"plan.assume must be NAME=VALUE,NAME=VALUE with numbers, not {text!r}") from None
    return figures


def load(arguments: Sequence[str]) -> tuple[Config, PlanSettings]:
    """The run's settings and the plan's own. `--calibrate` is short for `--plan.calibrate true`.

    Without --preset and --config, `--plan.against FOLDER` takes the settings of that run. Raises UserError as
    gadcore.config.loading.load does, SystemExit(0) for --help.
    """
    ours: list[str] = []
    others: list[str] = []
    items = iter("--plan.calibrate=true" if item == "--calibrate" else item for item in arguments)
    for item in items:
        if item in HELP or item == "--plan" or item.startswith(("--plan.", "--plan=")):
            ours.append(item)
            if item.startswith("--plan.") and "=" not in item:
                ours += [following for following in [next(items, None)] if following is not None]
        else:
            others.append(item)
    plan = loading.load(ours, PlanConfig).plan
    begins = any(item.split("=")[0] in ("--config", "--preset") for item in others)
    saved = Path(plan.against) / "config.toml" if plan.against and not begins else None
    if saved and not saved.is_file():
        raise UserError(f"plan.against = {plan.against} is not a run folder: it has no config.toml")
    default = loading.DEFAULT_PRESET if saved else default_preset(others)
    return loading.load(others, saved=saved, default=default), plan
