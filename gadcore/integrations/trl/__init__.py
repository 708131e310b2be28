"""GAD in a TRL program: the discriminator as a reward of GRPOTrainer, and gadcore's kernels inside that trainer.

A name is imported as it is asked for: TRL itself takes seconds, and GADReward does not need it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gadcore.errors import UserError

if TYPE_CHECKING:
    from gadcore.integrations.trl.remote import GADServiceReward as GADServiceReward
    from gadcore.integrations.trl.reward import GADReward as GADReward
    from gadcore.integrations.trl.trainer import GADGRPOTrainer as GADGRPOTrainer
    from gadcore.integrations.trl.warmup import GADWarmup as GADWarmup

_HOMES = {
    "GADGRPOTrainer": "gadcore.integrations.trl.trainer",
    "GADReward": "gadcore.integrations.trl.reward",
    "GADServiceReward": "gadcore.integrations.trl.remote",
    "GADWarmup": "gadcore.integrations.trl.warmup",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(import_module(_HOMES[name]), name)
    except ImportError as error:
        raise UserError(f"{name} needs TRL, which does not load ({error}): pip install 'gadcore[trl]'") from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
