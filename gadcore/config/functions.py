"""Functions that settings name, as "module:function": algorithm.loss and algorithm.reward."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from gadcore.errors import UserError


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
