"""The device that the settings name, what it is called, and libraries kept from printing.

torch and transformers are imported only when they are needed: a wrong setting is reported before they are loaded.
"""

from __future__ import annotations

import logging
import platform
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from gadcore.config.driver import find_driver, hidden_on_purpose, why_unseen
from gadcore.config.settings import Config
from gadcore.errors import UserError

if TYPE_CHECKING:
    import torch


def best_device() -> torch.device:
    """The GPU where there is one, else the CPU.

    Raises UserError where the driver has a GPU that torch does not see: days on a CPU are nothing to be begun unasked.
    """
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda")
    driver = None if hidden_on_purpose() else find_driver()
    if driver is not None and driver.gpus:
        reason = why_unseen(driver, torch.__version__, torch.version.cuda)
        raise UserError(f"{reason}; or leave the GPU out: set run.device = cpu, or an empty CUDA_VISIBLE_DEVICES")
    return torch.device("cpu")


def device_of(config: Config) -> torch.device:
    """The device that run.device names. Raises UserError where it is none, or is not there."""
    import torch

    if config.run.device == "auto":
        return best_device()
    try:
        device = torch.device(config.run.device)
    except RuntimeError as error:
        raise UserError(f"run.device = {config.run.device!r} is not a device: use auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda") or device.index is not None:
        raise UserError(
            f"run.device = {config.run.device!r} is not one of auto, cpu, cuda: CUDA_VISIBLE_DEVICES chooses the GPU"
        )
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"run.device = {config.run.device!r}, but torch sees no CUDA device: use cpu or auto")
    return device


def cpu_name() -> str:
    """The CPU's model, as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def quiet() -> None:
    """Keeps libraries from printing into the view of a run; their errors still raise."""
    import transformers

    # Progress bars and advice of the libraries below would tear the view.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    # Nothing writes into what a sharded model returns.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
