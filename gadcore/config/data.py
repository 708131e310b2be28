"""The settings of the rows: where they come from, how they are read, what limits they have."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from gadcore.config.kinds import Columns, Location, Positive, Section
from gadcore.config.template_arguments import TemplateArguments

# The value of data.eval that holds out some of the training rows.
SPLIT = "split"


class DataSettings(Section):
    """Rows, templates and limits."""

    train: Location = Field(
        "builtin",
        description="File (JSON lines, a JSON array, CSV, parquet), directory of these, hub id, or 'builtin'.",
    )
    eval: Location | None = Field(
        "builtin",
        description='Held-out rows, in the same forms; "split": some of data.train, which is the default for rows of '
        'your own; "none": no evaluation.',
    )
    eval_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.1,
        description='Share of the training rows that data.eval = "split" holds out, eval_rows at most. Which ones '
        "depends on run.seed and the prompts alone; rows with one prompt stay together.",
    )
    columns: Columns = Field(
        default_factory=dict,
        description="Column map, {prompt = 'question', teacher_response = 'answer'} or "
        "prompt=question,teacher_response=answer; a+b joins columns, none leaves one out.",
    )
    eval_columns: Columns | None = Field(None, description="Column map of data.eval; default: data.columns.")
    bad_rows: Literal["error", "skip"] = Field(
        "error", description="Rows that cannot be used end the run, or are left out; either way they are listed."
    )
    system_prompt: str | None = Field(None, description="Put before conversations that have no system message.")
    template_arguments: TemplateArguments = Field(
        default_factory=dict,
        description="What chat templates are rendered with, for example {enable_thinking = false}, or "
        "enable_thinking=false on a command line; the template that is saved with the student has them as defaults.",
    )
    max_prompt_tokens: Positive = 2048
    max_response_tokens: Positive = 1536
    long_prompt: Literal["truncate", "drop", "error"] = Field(
        "truncate", description="truncate cuts inside the last user text; every such row is counted and reported."
    )
    long_response: Literal["cut", "drop", "error"] = Field(
        "cut",
        description="A longer teacher response is cut, as a student's sample would be, dropped, or refused.",
    )
    reasoning: Literal["keep", "strip", "error"] = Field(
        "keep",
        description="Blocks of reasoning (<think>): kept on both sides; taken off the teacher's text, and off what the "
        "discriminator sees of a sample; or refused (gadcore/data/reasoning.py).",
    )
    train_rows: Positive | None = Field(None, description="Use only the first rows of the training set.")
    eval_rows: Positive | None = Field(None, description="Use only the first rows of the held-out set.")
    eval_samples: Positive = Field(1, description="Of a held-out prompt, in the evaluations of a run.")

    @model_validator(mode="before")
    @classmethod
    def _judged_by_their_like(cls, values: Any) -> Any:
        """Rows of one's own are not measured on rows that nobody named."""
        if not isinstance(values, dict) or "eval" in values:
            return values
        own = "eval_share" in values or values.get("train", "builtin") != "builtin"
        return {**values, "eval": SPLIT} if own else values
