"""GAD in a TRL program: the discriminator as a reward of GRPOTrainer, and gadcore's kernels inside that trainer."""

from gadcore.errors import UserError

try:
    import trl as _trl
except ImportError as error:
    raise UserError(
        f"gadcore.integrations.trl needs TRL, which does not load ({error}): pip install 'gadcore[trl]'"
    ) from error

from gadcore.integrations.trl.remote import GADServiceReward
from gadcore.integrations.trl.reward import GADReward
from gadcore.integrations.trl.trainer import GADGRPOTrainer
from gadcore.integrations.trl.warmup import GADWarmup

__all__ = ["GADGRPOTrainer", "GADReward", "GADServiceReward", "GADWarmup"]
del _trl
