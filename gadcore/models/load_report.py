"""transformers' report of loading: kept from a program's output where all that it tells was done on purpose."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

_LOGGER = logging.getLogger("transformers.modeling_utils")
_REPORT = "LOAD REPORT"
# A discriminator made of a language model: a scalar head in place of the other one.
_MADE_ANEW, _LEFT_BEHIND = "score.", "lm_head."


class _Held(logging.Filter):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def filter(self, record: logging.LogRecord) -> bool:
        if _REPORT not in record.getMessage():
            return True
        self.records.append(record)
        return False


@contextmanager
def report_of_what_is_unexpected() -> Iterator[dict[str, Any]]:
    """Inside, models are loaded and what from_pretrained() says of it is put into the dict, under its own names.

    The report is logged at the end as ever, unless a new scalar head in place of an output head is all there was to
    report.
    """
    held, info = _Held(), dict[str, Any]()
    _LOGGER.addFilter(held)
    try:
        yield info
    finally:
        _LOGGER.removeFilter(held)
        if not _only_a_new_head(info):
            for record in held.records:
                _LOGGER.handle(record)


def _only_a_new_head(info: Mapping[str, Any]) -> bool:
    """Whether a head is all that is missing or left over. False before anything is known of the loading."""
    return (
        bool(info.get("missing_keys"))
        and all(name.startswith(_MADE_ANEW) for name in info["missing_keys"])
        and all(name.startswith(_LEFT_BEHIND) for name in info["unexpected_keys"])
        and not info["mismatched_keys"]
        and not info.get("error_msgs")
    )
