"""What a model card says of the run that it comes from."""

from __future__ import annotations

from typing import Any

from gadcore.checkpoint.card import model_card
from gadcore.config import loading


def progress(stage: str) -> dict[str, Any]:
    return {"lasted": {}, "stage": stage, "stage_step": 3, "step": 3, "evaluations": {}}


def test_a_baseline_is_called_by_its_name_and_paper() -> None:
    config = loading.load([])
    gad = model_card(config, "student", progress("gad"))
    assert "a run of Generative Adversarial Distillation ([arXiv 2511.10643]" in gad and "- gad\n" in gad
    soda = model_card(config, "student", progress("soda"))
    assert "SODA" in soda and "arxiv.org/abs/2604.03873" in soda and "- soda\n" in soda and "Adversarial" not in soda


def test_adapters_are_named_where_the_model_has_them() -> None:
    config = loading.load(
        ["--student.adapter", "lora", "--student.adapter_rank", "8", "--discriminator.adapter", "none"]
    )
    card = model_card(config, "student", progress("gad"))
    assert "| `student.adapter` | `lora` |" in card and "| `student.adapter_rank` | `8` |" in card
    assert "adapter" not in model_card(config, "discriminator", progress("gad"))
