"""Which preset a command line means that names none. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from gadcore.config.command_line import setting_kinds, split
from gadcore.config.driver import find_driver, hidden_on_purpose
from gadcore.config.loading import DEFAULT_PRESET
from gadcore.config.settings import Config

GPU_PRESET = "smollm2-gpu"


def default_preset(arguments: Sequence[str]) -> str:
    """smollm2-gpu where the driver has a GPU and run.device leaves it open, else smollm2-cpu.

    A GPU that torch does not see is no CPU: the run says what is wrong (gadcore.config.device). Raises UserError for a
    command line that cannot be taken apart.
    """
    bases, overrides = split(arguments, setting_kinds(Config))
    if bases or overrides.get("run.device", "auto") not in ("auto", "cuda") or hidden_on_purpose():
        return DEFAULT_PRESET
    driver = find_driver()
    return GPU_PRESET if driver is not None and driver.gpus else DEFAULT_PRESET
