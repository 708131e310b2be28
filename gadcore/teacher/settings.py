"""Settings of an endpoint, and of `python -m gadcore.run collect`."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import ConfigDict, Field, field_validator, model_validator

from gadcore.config.kinds import Columns, Location, NonNegative, Positive, Rate, Section

OPENAI = "api.openai.com"
Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# A request without these would not be one conversation with one whole answer, or would not be what its key says.
_RESERVED = ("messages", "model", "n", "stream", "stream_options")


class Endpoint(Section):
    """An OpenAI-compatible server, and how hard it may be worked."""

    base_url: str = Field(f"https://{OPENAI}/v1", description="A local vLLM: http://127.0.0.1:8000/v1.")
    model: str = Field("", description="The model's name on that server; must be given.")
    api_key_variable: str = Field(
        "OPENAI_API_KEY", description="Environment variable that holds the key. A local server needs none."
    )
    concurrency: Positive = Field(16, description="Requests in flight at a time.")
    timeout: Seconds = Field(600.0, description="For one whole answer.")
    total_timeout: Seconds = Field(1800.0, description="For one request, all its attempts and waits together.")
    max_answer_mib: Annotated[float, Field(gt=0, le=1024)] = Field(
        16.0, description="Of an answer's body, decompressed; a larger one is not read and not asked for again."
    )
    max_retries: NonNegative = Field(
        5,
        description="Of one request: after 408, 409, 425, 429, 5xx, timeouts, lost connections and unusable answers, "
        "but not after errors that stay.",
    )
    give_up_after: Positive = Field(20, description="Failed requests in a row, each after its retries, that end it.")
    requests_per_minute: Positive | None = Field(None, description="In any 60 seconds, retries included.")
    tokens_per_minute: Positive | None = Field(None, description="In any 60 seconds, prompt and response.")
    price_input: Price | None = Field(None, description="Money per million prompt tokens.")
    price_output: Price | None = Field(None, description="Money per million response tokens.")

    @field_validator("base_url")
    @classmethod
    def _no_secret_in_the_url(cls, url: str) -> str:
        parts = urlsplit(url)
        try:
            valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            valid = False
        if not valid:
            raise ValueError("endpoint.base_url must be an address like https://host/v1 or http://127.0.0.1:8000/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(
                "endpoint.base_url must be an address only, like https://host/v1: a key belongs into the environment"
            )
        return url

    @field_validator("api_key_variable")
    @classmethod
    def _a_name_and_not_the_key(cls, name: str) -> str:
        # The value is not repeated: whoever gets this wrong has most likely written the key itself.
        if not re.fullmatch(r"[A-Z][A-Z0-9_]*", name):
            raise ValueError(
                "endpoint.api_key_variable must be the NAME of an environment variable, in capitals: the key itself "
                "must not be in the settings"
            )
        return name

    @property
    def host(self) -> str:
        """Host and port, for data cards."""
        return urlsplit(self.base_url).netloc

    @property
    def address(self) -> str:
        """base_url in one spelling: what may be written in several ways is one server."""
        parts = urlsplit(self.base_url)
        port = "" if parts.port in (None, {"http": 80, "https": 443}[parts.scheme]) else f":{parts.port}"
        host = parts.hostname or ""
        return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}{port}{parts.path.rstrip('/')}"


class Budget(Section):
    """Where to stop. Everything in the store counts, whichever run paid for it."""

    requests: Positive | None = Field(None, description="Answers, unusable ones included.")
    tokens: Positive | None = Field(None, description="Prompt and response tokens.")
    money: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="In the currency of the prices."
    )


class PromptSettings(Section):
    """What to ask."""

    source: Location = Field(
        "", description="File (.txt: a prompt a line; .jsonl, ..), directory or hub id; must be given."
    )
    columns: Columns = Field(default_factory=dict, description="Column map, as data.columns of a training run.")
    rows: Positive | None = Field(None, description="Use only the first rows.")
    system_prompt: str | None = Field(
        None, description="Told to the teacher where a conversation has no system message; not kept in the rows."
    )


class SamplingSettings(Section):
    """Parameters of a request; part of its key. none: not sent, so the server's own default holds."""

    temperature: Rate | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Positive | None = Field(1536, description="Of a response. none: the server's limit.")
    max_tokens_name: Literal["max_completion_tokens", "max_tokens"] = Field(
        "max_completion_tokens", description="Some older servers know only max_tokens."
    )
    seed: NonNegative | None = None
    extra: dict[str, Any] = Field(
        default_factory=dict, description="Other fields of the request, for example {reasoning_effort = 'minimal'}."
    )

    @field_validator("extra")
    @classmethod
    def _free_fields_only(cls, extra: dict[str, Any]) -> dict[str, Any]:
        taken = {"temperature", "top_p", "max_tokens", "max_completion_tokens", "seed"}
        for name in extra:
            if name in _RESERVED:
                raise ValueError(
                    f"sampling.extra cannot set {name}: a request is one conversation and one whole answer"
                )
            if name in taken:
                raise ValueError(f"sampling.extra cannot set {name}: it has a setting of its own")
        try:
            json.dumps(extra, allow_nan=False).encode()
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"sampling.extra holds what a request cannot ({error}): leave it out") from None
        return extra

    def parameters(self) -> dict[str, Any]:
        """The fields of the request's body besides model and messages."""
        chosen = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            self.max_tokens_name: self.max_tokens,
            "seed": self.seed,
        }
        return {name: value for name, value in chosen.items() if value is not None} | self.extra


class OutputSettings(Section):
    """What becomes of the replies."""

    dir: Location = Field("collected", description="Holds replies.jsonl, train.jsonl, README.md (the data card), ..")
    teacher: str | None = Field(None, description="Name of the teacher in the rows; default endpoint.model.")
    keep_cut: bool = Field(False, description="Also train on responses that ran into the length limit.")
    keep_refused: bool = Field(False, description="Also train on refusals.")
    eval_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Share of the prompts, chosen by their hash, whose rows go to eval.jsonl."
    )


class AskingConfig(Section):
    """What every command that asks an endpoint is told."""

    endpoint: Endpoint = Endpoint()
    budget: Budget = Budget()

    @model_validator(mode="after")
    def _money_needs_prices(self) -> AskingConfig:
        if self.budget.money is not None and None in (self.endpoint.price_input, self.endpoint.price_output):
            raise ValueError(
                "budget.money needs endpoint.price_input and endpoint.price_output, per million tokens: set both"
            )
        return self


class CollectConfig(AskingConfig):
    """Responses of a teacher to your prompts, over an OpenAI-compatible API."""

    model_config = ConfigDict(title="collect")

    prompts: PromptSettings = PromptSettings()
    sampling: SamplingSettings = SamplingSettings()
    output: OutputSettings = OutputSettings()
