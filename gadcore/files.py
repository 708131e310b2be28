"""Files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, text: str, *, errors: str = "strict") -> None:
    """Writes a text file as UTF-8; its folder is made. A reader, or a kill, finds the old file or the new one.

    errors: as of str.encode(), for text with half of a surrogate pair, which has no UTF-8.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8", errors=errors)
    os.replace(partial, path)
