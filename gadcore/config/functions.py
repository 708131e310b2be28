"""What settings name as "module:function" or "module:class": algorithm.loss, algorithm.reward and rollout.engine."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from gadcore.config.rollout import OwnRollout
from gadcore.config.settings import Config
from gadcore.errors import UserError


def check_named(config: Config) -> None:
    """Imports what the settings name, so that a wrong name is told before a model is loaded or a folder made.

    Raises UserError as load_named does.
    """
    for key, name in (("algorithm.loss", config.algorithm.loss), ("algorithm.reward", config.algorithm.reward)):
        if name is not None:
            load_named(name, key)
    if isinstance(config.rollout, OwnRollout):
        load_named(config.rollout.engine, "rollout.engine", "class")


def load_named(name: str, key: str, what: str = "function") -> Any:
    """The function or class that the setting `key` names; modules of the current directory are found as well.

    what: "function", or "class". Raises UserError where the module cannot be imported, or has none of that name.
    """
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except Exception as error:  # whatever a user's module raises
        what_happened = error if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{key} = {name!r}: the module {module} cannot be imported ({what_happened})") from error
    if not callable(found) or (what == "class" and not isinstance(found, type)):
        raise UserError(f"{key} = {name!r}: the module {module} has no {what} {attribute!r}")
    return found
