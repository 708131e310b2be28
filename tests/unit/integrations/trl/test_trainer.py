"""GADGRPOTrainer's loss and gradients against those of TRL's own trainer, over the variants of TRL's own tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOTrainer

from gadcore.errors import UserError
from gadcore.integrations.trl import trainer as ours
from gadcore.integrations.trl.trainer import GADGRPOTrainer
from tests.support.tiny import save_tiny, tiny_model
from tests.support.trl_trainers import ROWS, batch, make

KINDS = ("bnpo", "cispo", "dapo", "dr_grpo", "grpo", "luspo", "sapo", "vespo")
# TRL's default corrects the KL term by the ratio, which the one-pass head does not do.
BIASED: dict[str, Any] = dict(beta=0.04, args=dict(use_bias_correction_kl=False))
# A variant: attributes of the trainer, arguments, what the batch has.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "reference": BIASED,
    "old policy": dict(old=True),
    "both": BIASED | dict(old=True),
    "by sequence": dict(importance_sampling_level="sequence", old=True),
    "two-sided": dict(args=dict(delta=1.05), old=True),
    "corrected KL": dict(beta=0.04, old=True, args=dict(use_bias_correction_kl=True)),
    "high entropy": dict(top_entropy_quantile=0.5, old=True),
    "off-policy mask": dict(off_policy_mask_threshold=0.01, old=True),
    "sampler": dict(old=True, ratio=True, use_vllm=True, vllm_importance_sampling_correction=True),
    "tools": BIASED | dict(tools=True),
    "truncated": BIASED | dict(masked=(1, 2, 5)),
    "one prompt gone": dict(masked=(0, 1, 2, 3)),
    "all masked": dict(masked=range(8)),
    "advantages by token": dict(by_token=True),
    "asymmetric clip": dict(epsilon_low=0.1, epsilon_high=0.4, old=True),
    "evaluation": dict(evaluation=True),
}
ONE_PASS = {"plain", "reference", "old policy", "both", "tools", "truncated", "one prompt gone", "asymmetric clip"}


@pytest.fixture(scope="module")
def trainers(tmp_path_factory: pytest.TempPathFactory) -> tuple[GRPOTrainer, GADGRPOTrainer]:
    folder = tmp_path_factory.mktemp("trainers")
    model = save_tiny(folder / "model")
    return make(GRPOTrainer, model, folder / "trl"), make(GADGRPOTrainer, model, folder / "ours")


def passed(trainer: GRPOTrainer, inputs: dict[str, Any], variant: dict[str, Any]) -> dict[str, Any]:
    """Loss, gradients and metrics of a variant."""
    settings = {k: v for k, v in variant.items() if hasattr(trainer, k) and k not in ("args", "tools")}
    before = {k: getattr(trainer, k) for k in settings}
    arguments = {k: getattr(trainer.args, k) for k in variant.get("args", {})}
    trainer._metrics["train"].clear(), trainer._metrics["eval"].clear()
    trainer.model.zero_grad()
    trainer.model.train(not variant.get("evaluation"))
    trainer.current_gradient_accumulation_steps = 3
    try:
        for owner, values in ((trainer, settings), (trainer.args, variant.get("args", {}))):
            for key, value in values.items():
                setattr(owner, key, value)
        loss = trainer._compute_loss(trainer.model, dict(inputs))
        loss.backward()
    finally:
        for owner, values in ((trainer, before), (trainer.args, arguments)):
            for key, value in values.items():
                setattr(owner, key, value)
    metrics = {k: v[-1] for values in trainer._metrics.values() for k, v in values.items()}
    return {"loss": loss.item(), "metrics": metrics, "gradient": [p.grad for p in trainer.model.parameters()]}


def problem(variant: dict[str, Any], logprob: torch.Tensor) -> dict[str, Any]:
    inputs = batch(320)
    noise = inputs.pop("noise")
    mask = inputs["completion_mask"]
    mask[list(variant.get("masked", ()))] = 0
    if variant.get("old"):
        inputs["old_per_token_logps"] = logprob + noise[0]
    inputs["ref_per_token_logps"] = logprob + noise[1]
    if variant.get("ratio"):
        inputs["importance_sampling_ratio"] = noise[2].exp().clamp(max=1.2)
    if variant.get("tools"):
        inputs["tool_mask"] = (torch.arange(mask.numel()).view(mask.shape) % 3 != 1).long()
    if variant.get("by_token"):
        inputs["advantages"] = inputs["advantages"][:, None] + noise[2]
    return inputs


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_gradients_and_metrics_are_those_of_trl(
    kind: str, name: str, trainers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, mine = trainers
    variant = VARIANTS[name] | dict(loss_type=kind)
    if kind == "vespo" and name == "sampler":
        variant.pop("ratio")
    ids = batch(320)
    with torch.no_grad():
        whole = torch.cat([ids["prompt_ids"], ids["completion_ids"]], 1)
        seen = torch.cat([ids["prompt_mask"], ids["completion_mask"]], 1)
        logprob, _, _ = theirs._get_per_token_logps_and_entropies(theirs.model, whole, seen, 6)
    inputs = problem(variant, logprob)
    calls = []
    one_pass = GADGRPOTrainer._one_pass
    monkeypatch.setattr(GADGRPOTrainer, "_one_pass", lambda *a: calls.append(1) or one_pass(*a))

    expected, found = passed(theirs, inputs, variant), passed(mine, inputs, variant)

    assert bool(calls) == (
        name in ONE_PASS and (kind in ("dapo", "bnpo", "dr_grpo") or (kind == "grpo" and not variant.get("beta")))
    )
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5, abs=1e-6)
    norm = torch.cat([g.flatten() for g in expected["gradient"]]).norm()
    for mine_, theirs_ in zip(found["gradient"], expected["gradient"], strict=True):
        assert (mine_ - theirs_).norm() <= 1e-5 * norm
    if name != "all masked":
        assert norm > 0
        assert found["metrics"].keys() == expected["metrics"].keys()
        for key, value in expected["metrics"].items():
            assert found["metrics"][key] == pytest.approx(value, rel=1e-4, abs=1e-5, nan_ok=True), key


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "mistral", "gemma3", "smollm3"])
def test_families(kind: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", kind, tied=kind != "qwen3")
    theirs, mine = make(GRPOTrainer, model, tmp_path), make(GADGRPOTrainer, model, tmp_path)
    inputs = batch(320)
    inputs.pop("noise")
    expected, found = passed(theirs, inputs, {}), passed(mine, inputs, {})
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5, abs=1e-6)
    norm = torch.cat([g.flatten() for g in expected["gradient"]]).norm()
    for mine_, theirs_ in zip(found["gradient"], expected["gradient"], strict=True):
        assert (mine_ - theirs_).norm() <= 2e-5 * norm


SCHEDULES = {
    "one batch": {},
    "accumulated": dict(gradient_accumulation_steps=4),
    "a generation a part": dict(gradient_accumulation_steps=4, steps_per_generation=2, num_iterations=1),
    "reused": dict(steps_per_generation=2, num_iterations=2, beta=0.05),
    "checkpointed": dict(gradient_checkpointing=True, beta=0.05, gradient_accumulation_steps=2),
    "group over micro-batches": dict(per_device_train_batch_size=2, gradient_accumulation_steps=4, loss_type="grpo"),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_training_run_is_that_of_trl(name: str, tmp_path: Path) -> None:
    """Samples, rewards, log and weights after three steps, whatever is accumulated, reused or recomputed."""
    model = save_tiny(tmp_path / "model")
    runs = []
    for kind in (GRPOTrainer, GADGRPOTrainer):
        trainer = make(kind, model, tmp_path / kind.__name__, max_steps=3, optim="sgd", **SCHEDULES[name])
        trainer.train()
        log = [
            {k: v for k, v in entry.items() if "time" not in k and "second" not in k}
            for entry in trainer.state.log_history[:3]
        ]
        runs.append((trainer, log))
    (theirs, expected), (mine, found) = runs
    for a, b in zip(expected, found, strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert b[key] == pytest.approx(value, rel=2e-3, abs=1e-5), key
    start = tiny_model()
    for p, q, before in zip(theirs.model.parameters(), mine.model.parameters(), start.parameters(), strict=True):
        assert (p - q).norm() <= 1e-3 * (p - before).norm() + 1e-9


def test_a_prompt_passes_through_the_model_once(trainers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, mine = trainers
    inputs = batch(320)
    inputs.pop("noise")
    seen = []
    of = ours.packed_rows

    def watched(*arguments: Any) -> Any:
        for rows in of(*arguments):
            seen.append(rows.batch.input_ids.shape[1])
            yield rows

    monkeypatch.setattr(ours, "packed_rows", watched)
    passed(mine, inputs, {})
    # The last token of a completion predicts nothing.
    expected = inputs["prompt_mask"][::4].sum() + (inputs["completion_mask"].sum(1) - 1).sum()
    assert seen == [expected]


REFUSED = {
    "entropy_coef": (dict(entropy_coef=0.1), {}),
    "cast_lm_head_to_fp32": (dict(cast_lm_head_to_fp32=True), {}),
    "torch_compile": (dict(torch_compile=True), {}),
    "eager": (dict(model_init_kwargs=dict(attn_implementation="eager", dtype="float32")), {}),
}


@pytest.mark.parametrize("word", REFUSED)
def test_what_it_cannot_compute_is_refused_in_a_sentence(word: str, tmp_path: Path) -> None:
    changes, _ = REFUSED[word]
    with pytest.raises(UserError, match=word):
        make(GADGRPOTrainer, save_tiny(tmp_path / "model"), tmp_path, rows=ROWS, **changes)
