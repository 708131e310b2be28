"""JSON files that programs wrote and people, crashes and disks may have changed since: read as what they should be."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from gadcore.errors import UserError
from gadcore.files import parse_json

T = TypeVar("T")


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("should be a number")
    return value


def _finite(value: Any) -> Any:
    if not abs(_number(value)) <= 1e30:
        raise ValueError("should be a finite number that can be reckoned with")
    return value


def _figure(value: Any) -> Any:
    if math.isfinite(_number(value)) and abs(value) > 1e100:
        raise ValueError("should be a number that can be reckoned with")
    return value


# A figure as a run writes it, which may be NaN or infinite; a finite one.
Figure = Annotated[float, BeforeValidator(_figure)]
Finite = Annotated[float, BeforeValidator(_finite)]
Count = Annotated[int, Field(strict=True, ge=0, le=10**15)]


def fitting(kind: TypeAdapter[T], value: Any, where: object, advice: str) -> T:
    """The value as the kind has it; UserError that names `where`, the first field that is wrong, and the advice."""
    try:
        return kind.validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        rule = (
            first["msg"]
            .removeprefix("Value error, ")
            .replace("Input should", "should")
            .replace("Field required", "missing")
        )
        raise UserError(f"{where} is damaged ({field}{': ' if field else ''}{rule}): {advice}") from None


def read_json(path: Path, advice: str = "delete it and run what made it again") -> dict[str, Any]:
    """A JSON object; UserError, which ends with the advice, where the file is damaged or missing."""
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {advice}") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): {advice}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object: {advice}")
    return value


def read_as(kind: TypeAdapter[T], path: Path, advice: str = "delete it and run what made it again") -> T:
    """A JSON object as the kind has it; raises UserError as read_json() and fitting() do."""
    return fitting(kind, read_json(path, advice), path, advice)
