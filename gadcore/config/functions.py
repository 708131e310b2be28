"""Functions that settings name, as "module:function": algorithm.loss and algorithm.reward."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from gadcore.config.settings import AlgorithmSettings
from gadcore.errors import UserError


def check_functions(algorithm: AlgorithmSettings) -> None:
    """Imports what the settings name, so that a wrong name is told before a model is loaded or a folder made.

    Raises UserError as load_function does.
    """
    for key, name in (("algorithm.loss", algorithm.loss), ("algorithm.reward", algorithm.reward)):
        if name is not None:
            load_function(name, key)


def load_function(name: str, key: str) -> Any:
    """The function that the setting `key` names; modules of the current directory are found as well.

    Raises UserError where the module cannot be imported, or has no such function.
    """
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ImportError as error:
        raise UserError(f"{key} = {name!r}: the module {module} cannot be imported ({error})") from error
    if not callable(found):
        raise UserError(f"{key} = {name!r}: the module {module} has no function {function!r}")
    return found
