"""The kinds of values that settings have, and what all of their sections share."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

# Whatever counts or seeds something fits into 32 bits, as the libraries below want it.
Positive = Annotated[int, Field(gt=0, lt=2**31)]
NonNegative = Annotated[int, Field(ge=0, lt=2**31)]
Rate = Annotated[float, Field(ge=0)]
Above = Annotated[float, Field(gt=0)]
# Comes with gadcore (gadcore.models.loading), whatever lies in the directory.
BUNDLED_MODEL = "smollm2-135m-instruct"
Share = Annotated[float, Field(ge=0, le=1)]
Dtype = Literal["float32", "bfloat16"]
Master = Annotated[
    Literal["device", "host"],
    Field(
        description="Where the optimizer's weights and moments lie; host: float32 in page-locked host memory, beside "
        "bfloat16 weights and float32 gradients on the device."
    ),
]


def _expanded(value: str) -> str:
    """~ and ~name at the beginning as the home folder that they stand for, as a shell has it."""
    found = os.path.expanduser(value)
    if value.startswith("~") and found == value:
        raise ValueError(
            f"{value!r} begins with the home folder of a user who does not exist: write the path out, or ./{value} for "
            "a file of that name"
        )
    return found


# Of a file or folder, or a name that stands for one.
Location = Annotated[str, AfterValidator(_expanded)]


def pairs(text: str, key: str) -> dict[str, str]:
    """'a=x,b=y' as {"a": "x", "b": "y"}. Raises ValueError, which names the setting `key`."""
    items = [item.partition("=") for item in text.split(",")]
    if not all(name.strip() and equals and value.strip() for name, equals, value in items):
        raise ValueError(f"{key} must be a table or NAME=VALUE,NAME=VALUE, not {text!r}")
    table = {name.strip(): value.strip() for name, _, value in items}
    if len(table) < len(items):
        raise ValueError(f"{key} uses a name twice: {text}")
    return table


def _columns(value: Any) -> Any:
    try:
        return pairs(value, "columns") if isinstance(value, str) else value
    except ValueError:
        return value  # and no table


# A column map: a table, or as one writes it on a command line, prompt=question,teacher_response=answer.
Columns = Annotated[dict[str, str], BeforeValidator(_columns)]


def named_object(name: str, key: str, what: str, example: str) -> str:
    """`name`, of the form module:attribute. Raises ValueError, which names the setting `key`, where it is not.

    what: "function" or "class".
    """
    if not re.fullmatch(r"(?!.*\.py:)[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", name):
        raise ValueError(
            f"{key} = {name!r} is not of the form module:{what}: write the name by which Python imports the module, a "
            f"colon, and the {what}, for example {example}"
        )
    return name


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    # Of all settings of a command: {"section.key" that it has not, though others do: what to do instead}.
    instead: ClassVar[Mapping[str, str]] = {}


class Trained(Section):
    """Of a model that is trained."""

    if TYPE_CHECKING:
        dtype: Dtype
        autocast: Literal["none", "bfloat16"]
        master: Master
        adapter: Literal["none", "lora"]

    @property
    def weights_dtype(self) -> Dtype:
        """Of the weights that the device computes with."""
        # A frozen base is kept as the products read it: nothing is added to it that bfloat16 would lose.
        narrow = self.master == "host" or (self.adapter == "lora" and self.autocast == "bfloat16")
        return "bfloat16" if narrow else self.dtype


def anywhere(name: str | None, *words: str) -> str | None:
    """A path that is there as an absolute one; a name that stands for something else, as `words` do, as it is."""
    if name is None or name in words or not os.path.exists(name):
        return name
    return os.path.abspath(name)
