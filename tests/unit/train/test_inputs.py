"""Inputs: models are looked for once a role, or once for both."""

from __future__ import annotations

import pytest

from gadcore.config.settings import Config
from gadcore.models import spec
from gadcore.train.inputs import read_inputs
from tests.support.runs import write_rows
from tests.support.tiny import save_tiny


@pytest.mark.parametrize(("other", "looked_for"), [(False, ["model"]), (True, ["model", "other"])])
def test_a_model_is_resolved_once_a_role(tmp_path, monkeypatch, other, looked_for) -> None:
    for name in ("model", "other"):
        save_tiny(tmp_path / name)
    seen, resolve = [], spec.resolve_model
    monkeypatch.setattr(spec, "resolve_model", lambda name: seen.append(name.rpartition("/")[2]) or resolve(name))
    config = Config.model_validate(
        {
            "data": {"train": str(write_rows(tmp_path / "rows.jsonl")), "eval": None}
            | {"max_prompt_tokens": 96, "max_response_tokens": 24},
            "student": {"model": str(tmp_path / "model")},
            "discriminator": {"model": str(tmp_path / "other") if other else "student"},
        }
    )
    inputs = read_inputs(config, ("warmup", "gad"))
    assert seen == looked_for
    assert (inputs.discriminator is inputs.student) == (not other)
    assert read_inputs(config, ("seqkd",)).discriminator is None and seen == [*looked_for, "model"]
