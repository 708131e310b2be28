"""What can be told of a run before torch is loaded and its rows are read."""

from __future__ import annotations

import os

from gadcore.config.settings import Config
from gadcore.data.sources import Source
from gadcore.record.run_folder import check_free


def check_files(config: Config, *, new: bool) -> None:
    """Raises UserError for a data file that is not there, and where a new run cannot have its folder.

    Nothing is asked in a job of several processes: the first would end before the others could be told.
    """
    if "WORLD_SIZE" in os.environ:
        return
    if new:
        check_free(config)
    for source in (config.data.train, config.data.eval):
        if source is not None:
            Source.check(source)
