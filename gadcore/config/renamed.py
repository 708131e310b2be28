"""Settings and values that had another name: whoever uses the old one is told the new one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gadcore.errors import UserError

# "section.key": its name now; ("section.key", "old value"): that value now.
RENAMED: dict[str | tuple[str, str], str] = {
    ("data.train", "house"): "builtin",
    ("data.eval", "house"): "builtin",
}


def refuse_old_names(values: Mapping[str, Any], origins: Mapping[str, str]) -> None:
    """values, origins: of "section.key". Raises UserError for an old name; it says where it stands and the new one."""
    for key, value in values.items():
        if new := RENAMED.get(key):
            raise UserError(f"{key} ({origins[key]}) is called {new} now")
        if isinstance(value, str) and (new := RENAMED.get((key, value))):
            raise UserError(f'{key} = "{value}" ({origins[key]}) is called "{new}" now')
