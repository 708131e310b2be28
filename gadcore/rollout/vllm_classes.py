"""vLLM's hands off the trainer's classes.

Where vLLM has no model of its own for a family (SmolLM3, OLMo, GPT-NeoX), it runs transformers' and decorates that
class in place, of which the trainer's models are as well: their next forward pass would look for vLLM's attributes. So
what vLLM has added moves to a subclass, which the engine's own instances alone are of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel


class TrainersClasses:
    """The classes of a model's modules as they are now, and what transformers makes of a config.json."""

    def __init__(self, model: PreTrainedModel) -> None:
        classes = {c for module in model.modules() for c in type(module).__mro__ if _is_of_transformers(c)}
        self._before = {cls: (cls.__bases__, dict(vars(cls))) for cls in classes}
        self._configs = dict(CONFIG_MAPPING._extra_content)

    def restore(self, engine_models: Sequence[nn.Module]) -> list[type]:
        """Makes them so again; modules of `engine_models` keep what was added. Returns the classes that had changed."""
        CONFIG_MAPPING._extra_content.clear()
        CONFIG_MAPPING._extra_content.update(self._configs)
        return [cls for cls in self._before if self._restore(cls, engine_models)]

    def _restore(self, cls: Any, engine_models: Sequence[nn.Module]) -> bool:
        bases, own = self._before[cls]
        extra = tuple(base for base in cls.__bases__ if base not in bases)
        added = {name: value for name, value in vars(cls).items() if own.get(name, self) is not value}
        if not extra and not added:
            return False
        for name in added:
            if name in own:
                setattr(cls, name, own[name])
            else:
                delattr(cls, name)
        cls.__bases__ = bases
        decorated = type(cls.__name__, (cls, *extra), added)
        for engine_model in engine_models:
            for module in engine_model.modules():
                if type(module) is cls:
                    module.__class__ = decorated
        return True


def _is_of_transformers(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "transformers"
