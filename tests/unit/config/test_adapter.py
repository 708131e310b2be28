"""Settings of adapters."""

from __future__ import annotations

import pytest

from gadcore.config.adapter import LoRA, check_sampler, lora_of
from gadcore.config.loading import load
from gadcore.config.settings import Config
from gadcore.errors import UserError

# The default job's models have adapters.
WHOLE = ["--student.adapter", "none", "--discriminator.adapter", "none"]


def test_no_adapter_is_the_default_of_the_settings() -> None:
    config = Config()
    assert lora_of(config.student) is None and lora_of(config.discriminator) is None
    assert config.student.weights_dtype == "float32"


def test_an_adapter_of_defaults_and_one_of_settings() -> None:
    config = load(
        ["--student.adapter", "lora", "--discriminator.adapter", "lora", "--discriminator.adapter_rank", "64"]
        + ["--discriminator.adapter_targets", "q_proj, v_proj", "--discriminator.adapter_rslora", "true"]
    )
    assert lora_of(config.student) == LoRA(16, 32.0)
    assert lora_of(config.student).scale == 2.0
    scorer = lora_of(config.discriminator)
    assert scorer == LoRA(64, 128.0, ("q_proj", "v_proj"), rslora=True) and scorer.scale == 16.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [*WHOLE, "--student.adapter_rank", "8"],
            "student.adapter_rank say what an adapter is, and student.adapter = none",
        ),
        (["--student.adapter", "lora", "--student.master", "host"], "leave one of them out"),
        (["--student.adapter", "lora", "--student.adapter_targets", "q_proj,"], "adapter_targets must be"),
        (["--student.adapter", "dora"], "student.adapter"),
        (
            ["--student.adapter", "lora", "--rollout.tensor_parallel", "2"],
            "rollout.tensor_parallel = 2 cuts one sampler's weights .* set rollout.tensor_parallel = 1",
        ),
        (["--student.adapter", "lora", "--student.adapter_rank", "0"], "student.adapter_rank"),
        (
            ["--student.adapter", "lora", "--student.adapter_alpha", "24", "--rollout.dtype", "bfloat16"],
            r"scale of student.adapter \(1.5\) part of B, which rounds in bfloat16",
        ),
    ],
)
def test_what_contradicts_itself_is_told(arguments, message) -> None:
    with pytest.raises(UserError, match=message):
        load(arguments)


def test_a_server_that_gets_whole_weights_gets_no_adapter() -> None:
    student = load(["--student.adapter", "lora"]).student
    with pytest.raises(ValueError, match="vllm-server gets whole weights"):
        check_sampler(student, "vllm-server", "float32")
    check_sampler(load(WHOLE).student, "vllm-server", "float32")


@pytest.mark.parametrize(("alpha", "exact"), [(16.0, True), (64.0, True), (24.0, False), (1.0, True)])
def test_scales_that_vllm_makes_part_of_b(alpha: float, exact: bool) -> None:
    assert LoRA(16, alpha).exact == exact


def test_a_base_is_kept_as_the_products_read_it() -> None:
    config = load(["--student.adapter", "lora", "--student.autocast", "bfloat16"])
    assert (config.student.weights_dtype, config.student.dtype) == ("bfloat16", "float32")
