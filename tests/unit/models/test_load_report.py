"""transformers' report of loading a model: silent about the head that a discriminator gets on purpose, not else."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import transformers
from safetensors.torch import load_file, save_file
from torch import zeros

from gadcore import Discriminator
from gadcore.errors import UserError
from tests.support.tiny import save_tiny


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What reaches the handlers of transformers, as in a program of a user's own."""
    found: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    root = logging.getLogger("transformers")
    monkeypatch.setattr(root, "handlers", [Handler()])
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_warning()
    yield found
    transformers.logging.set_verbosity(before)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_made_anew_is_no_news(tied: bool, tmp_path: Path, said: list[str]) -> None:
    path = save_tiny(tmp_path / "model", tied=tied)
    Discriminator.load(str(path), device="cpu")
    assert said == []
    transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
    assert len(said) == 1 and "score.weight" in said[0]


def _changed(path: Path, **tensors: object) -> None:
    kept = load_file(path / "model.safetensors")
    save_file({**kept, **tensors}, path / "model.safetensors", metadata={"format": "pt"})


def test_everything_else_is_told(tmp_path: Path, said: list[str]) -> None:
    path = save_tiny(tmp_path / "model")
    _changed(path, **{"another_head.weight": zeros(2)})
    Discriminator.load(str(path), device="cpu")
    assert len(said) == 1 and "another_head.weight" in said[0]
    _changed(path, **{"model.norm.weight": zeros(3)})
    with pytest.raises(UserError, match="model.norm.weight"):
        Discriminator.load(str(path), device="cpu")
    assert len(said) == 2 and "model.norm.weight" in said[1]
