"""What a checkpoint keeps of models, optimizers and random generators, and how it gets back into them."""

from __future__ import annotations

import logging
import random
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gadcore.models.state import check_parameters as check_parameters
from gadcore.models.state import copy_into as copy_into
from gadcore.models.state import facts as facts
from gadcore.models.state import optimizer_tensors as optimizer_tensors
from gadcore.models.state import restore_optimizer as restore_optimizer
from gadcore.models.state import restore_parameters as restore_parameters

_log = logging.getLogger(__name__)


class RngState(NamedTuple):
    """Generator states: `state` for JSON (python, numpy), `tensors` (torch: cpu, cuda:0, cuda:1, ..)."""

    state: dict[str, Any]
    tensors: dict[str, Tensor]


def rng_state() -> RngState:
    """The states of python's random, numpy's global generator, torch's CPU generator and those of all GPUs."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda:{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    state = {
        "python": [version, list(words), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, cached],
    }
    return RngState(state, tensors)


def restore_rng(rng: RngState) -> None:
    """Sets what rng_state() gave. A GPU that is not here, or was not there, is named in a warning."""
    version, words, gauss = rng.state["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(rng.state["numpy"]))
    torch.set_rng_state(rng.tensors["cpu"])
    here = {f"cuda:{i}" for i in range(torch.cuda.device_count())}
    saved = set(rng.tensors) - {"cpu"}
    for device in sorted(here & saved):
        torch.cuda.set_rng_state(rng.tensors[device], device)
    if here != saved:
        _log.warning("random states not restored, because the GPUs differ: %s", ", ".join(sorted(here ^ saved)))
