"""What requests and answers look like. The OpenAPI page is made of it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Message(Body):
    role: Literal["system", "user", "assistant", "tool"]
    content: str


class GroupIn(Body):
    """A prompt with its teacher's response and samples of the student. Either `row`, or a prompt with its teacher."""

    id: str | None = Field(None, max_length=200, description="Comes back in the answer.")
    row: int | None = Field(
        None, ge=0, description="Of data.train, from 0: its teacher's response, and its prompt where none is given."
    )
    prompt: str | None = Field(None, description="Becomes a user's turn.")
    messages: list[Message] | None = Field(None, description="In place of prompt; the last one is the user's.")
    teacher_response: str | None = None
    teacher_finished: bool = Field(True, description="false: a limit cut it.")
    samples: list[str] = Field(min_length=1, description="The student's responses, without end markers.")
    finished: list[bool] | None = Field(None, description="Whether each sample ended by itself; default all did.")

    @model_validator(mode="after")
    def _one_of_each(self) -> GroupIn:
        if self.prompt is not None and self.messages is not None:
            raise ValueError("has prompt and messages: give one of them")
        if self.row is not None and self.teacher_response is not None:
            raise ValueError("has row and teacher_response: give one of them")
        if self.row is None and self.teacher_response is None:
            raise ValueError("has no teacher: give teacher_response, or row where the service has data.train")
        if self.row is None and self.prompt is None and self.messages is None:
            raise ValueError("has no prompt: give prompt or messages")
        if self.finished is not None and len(self.finished) != len(self.samples):
            raise ValueError(f"has {len(self.samples)} samples and {len(self.finished)} finished flags: give one each")
        return self


class ScoreIn(Body):
    groups: list[GroupIn] = Field(min_length=1)


class ScoreAndUpdateIn(ScoreIn):
    request_id: str = Field(
        min_length=1, max_length=200, description="A repetition under the same id gets the same answer, untrained."
    )
    student_version: Annotated[int, Field(ge=0)] | None = Field(None, description="Shown in the metrics.")


class FreezeIn(Body):
    frozen: bool = True


class RestoreIn(Body):
    version: int = Field(ge=0, description="As checkpoint gave it.")


class Nothing(Body):
    pass


class GroupOut(BaseModel):
    id: str | None
    teacher_score: float
    scores: list[float] = Field(description="D(x, y_s) of the samples, in their order: the rewards.")


class ScoresOut(BaseModel):
    """Scores are under the weights `scored_by`; `version` are the weights afterwards."""

    request_id: str | None
    version: int
    scored_by: int
    trained: bool
    duplicate: bool = Field(description="The request had been answered before.")
    groups: list[GroupOut]
    loss: float = Field(description="The Bradley-Terry loss of the update that the groups were part of, before it.")
    accuracy: float
    margin: float
    grad_norm: float | None


class VersionOut(BaseModel):
    version: int


class FrozenOut(VersionOut):
    frozen: bool


class AsleepOut(VersionOut):
    asleep: bool


class HealthOut(BaseModel):
    status: Literal["ready", "asleep"]
    model: str
    version: int
    frozen: bool
    waiting_groups: int


class Told(BaseModel):
    code: str
    message: str = Field(description="One sentence: what is wrong, and what to do.")


class ErrorOut(BaseModel):
    error: Told
