"""Engines by hand, for tests that ask them for what a Sampler does not."""

from __future__ import annotations

from transformers import PreTrainedModel

from gadcore.rollout.engine import Engine
from gadcore.rollout.weights import PlainWeights


def wake_with(engine: Engine, model: PreTrainedModel) -> None:
    """Wakes a sleeping engine, as every engine is at first, with the weights of `model`: it can sample then."""
    engine.wake("weights")
    engine.update_weights(PlainWeights(model))
    engine.wake("kv_cache")
