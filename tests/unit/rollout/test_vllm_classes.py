"""What vLLM adds to transformers' classes stays with vLLM's own instances."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, LlamaConfig, LlamaModel

from gadcore.rollout.vllm_classes import TrainersClasses
from tests.support.tiny import tiny_model


class _Compiling:
    """As vLLM's wrapper, which its decorator puts among a class's bases."""

    def compiled(self) -> str:
        return "compiled"


def test_a_decorated_class_is_the_trainers_again_and_the_engine_keeps_what_was_added() -> None:
    model, engine_model = tiny_model(), torch.nn.ModuleDict({"inner": tiny_model(seed=1).model})
    ids = torch.arange(6)[None]
    expected, of_engine = model(ids).logits, engine_model["inner"](ids).last_hidden_state
    forward, bases = LlamaModel.forward, LlamaModel.__bases__
    classes = TrainersClasses(model)

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        # vLLM's looks for attributes that it gave its own instances alone.
        return self.do_not_compile and forward(self, *args, **kwargs)

    LlamaModel.__bases__ = (*bases, _Compiling)
    LlamaModel.__call__ = broken
    LlamaModel.forward = broken
    LlamaModel.ignore_compile = False
    CONFIG_MAPPING._extra_content["strange"] = LlamaConfig
    engine_model["inner"].do_not_compile = True

    assert classes.restore([engine_model]) == [LlamaModel]
    assert LlamaModel.__bases__ == bases and LlamaModel.forward is forward and not hasattr(LlamaModel, "ignore_compile")
    assert "strange" not in CONFIG_MAPPING._extra_content
    assert torch.equal(model(ids).logits, expected)
    assert torch.equal(tiny_model().model(ids).last_hidden_state, model.model(ids).last_hidden_state)
    inner: Any = engine_model["inner"]
    assert isinstance(inner, LlamaModel) and inner.compiled() == "compiled" and inner.ignore_compile is False
    assert torch.equal(inner(ids).last_hidden_state, of_engine)
    assert classes.restore([engine_model]) == []
