"""The key to an endpoint, and the one place where it is taken out of whatever a server sends back."""

from __future__ import annotations

import string
from typing import Any

PIECE = 16
# A shorter key is a placeholder for a server without keys ("EMPTY", "none"): as a word it would be in many an answer.
SHORTEST = 8
MASK = "***"
_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)


class Secret:
    """A key, masked in text wherever it, or a piece of it of PIECE characters or more, stands, in capitals or not.

    key: "" where there is none.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        folded, self._size = key.translate(_LOWER), min(PIECE, len(key))
        ends = range(len(folded) - self._size + 1) if len(key) >= SHORTEST else ()
        self._pieces = {folded[i : i + self._size] for i in ends}

    def __repr__(self) -> str:
        return f"Secret({MASK})"

    def mask(self, text: str) -> str:
        """The text with *** in place of the key and of its pieces; to be called before anything is cut off the text."""
        if not self._pieces:
            return text
        folded, parts, kept, i = text.translate(_LOWER), [], 0, 0
        while i <= len(folded) - self._size:
            if folded[i : i + self._size] not in self._pieces:
                i += 1
                continue
            end = i + self._size
            while folded[end - self._size + 1 : end + 1] in self._pieces and end < len(folded):
                end += 1
            parts += [text[kept:i], MASK]
            kept = i = end
        return "".join([*parts, text[kept:]])

    def mask_all(self, value: Any) -> Any:
        """A value as JSON gives it with every text in it masked, keys of objects too; it must not be nested deep."""
        if isinstance(value, str):
            return self.mask(value)
        if isinstance(value, list):
            return [self.mask_all(item) for item in value]
        if isinstance(value, dict):
            return {self.mask(name): self.mask_all(item) for name, item in value.items()}
        return value
