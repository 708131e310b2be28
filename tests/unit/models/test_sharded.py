"""Student and discriminator in shards over several processes train as they do in one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from gadcore.distributed import fsdp
from gadcore.distributed.fsdp import local
from gadcore.distributed.world import World
from gadcore.models.activations import bytes_per_token
from gadcore.models.policy_loss import LossInputs
from gadcore.models.shallow import decoder_layers
from tests.support.builders import groups
from tests.support.ranks import run_ranks
from tests.support.sharding import Case, learners, relative, save_uneven, train

HERE = "tests.unit.models.test_sharded"
LOSS = f"{HERE}:reinforce"


def reinforce(inputs: LossInputs) -> torch.Tensor:
    return -(inputs.token_advantages * inputs.logprob).sum() / inputs.denominator


def cases(folder: Path) -> dict[str, Case]:
    tied, untied = Case(folder / "qwen2"), Case(folder / "llama")
    return {
        "tied": tied,
        "in files": replace(tied, offload="file"),
        "untied, all recomputed": replace(untied, mode="full"),
        "an idle process, own loss": replace(untied, count=1, micro_batch_tokens=10**6, mode="auto", loss=LOSS),
        "autocast, some recomputed": replace(tied, autocast="bfloat16", mode="selective"),
    }


def two(world: World, folder: Path) -> dict:
    found = {name: train(case, world, folder / f"{name}-{world.rank}") for name, case in cases(folder).items()}
    found["gathered"] = gathered_narrow(world, cases(folder)["autocast, some recomputed"])
    return found


def gathered_narrow(world: World, case: Case) -> dict:
    """Gradients under autocast, with parameters gathered in its dtype and in their own."""
    batch = groups(case.count, ragged=True)
    made, dtypes, kept = [], [], []
    for narrow in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not narrow:
                patch.setattr(fsdp, "gather_in", lambda *args: None)
            policy, judge = learners(case, world)
        policy.freeze_reference()
        scores = judge.score(batch, backward=True)
        policy.grpo_backward(batch, scores.sample_scores)
        made.append([local(p.grad).clone() for model in (policy, judge) for p in model.optimizer.parameters])
        layer = decoder_layers(policy.model)[0]
        layer.unshard()
        dtypes.append((layer.self_attn.q_proj.weight.dtype, layer.input_layernorm.weight.dtype))
        layer.reshard()
        kept.append(bytes_per_token(policy.model, "bfloat16")["off"])
    return {"same": all(map(torch.equal, *made)), "dtypes": dtypes, "kept": kept}


def four(world: World, folder: Path) -> dict:
    case = cases(folder)["tied"]
    found = {"sharded": train(case, world, folder / f"four-{world.rank}")}
    copies = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    found["two copies"] = train(case, replace(world, mesh=copies), folder / f"hybrid-{world.rank}")
    return found


@pytest.fixture(scope="module")
def folder(module_folder: Path) -> Path:
    save_uneven(module_folder / "qwen2", "qwen2", tied=True)
    save_uneven(module_folder / "llama", "llama", tied=False)
    return module_folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict:
    torch.set_num_threads(1)
    return {name: train(case) for name, case in cases(folder).items()}


@pytest.fixture(scope="module")
def of_two(folder: Path) -> list[dict]:
    return run_ranks(2, f"{HERE}:two", folder, deadline=240)


@pytest.fixture(scope="module")
def of_four(folder: Path) -> list[dict]:
    return run_ranks(4, f"{HERE}:four", folder, deadline=240)


@pytest.mark.parametrize("name", list(cases(Path())))
def test_two_processes_train_as_one(alone, of_two, name):
    _assert_same([found[name] for found in of_two], alone[name], 2)


def _assert_same(found: list[dict], expected: dict, ranks: int) -> None:
    first = found[0]
    assert relative(first["figures"], expected["figures"]) < 1e-5
    assert relative(first["weights"], expected["weights"]) < 1e-5
    for other in found:
        # To the bit, or processes would decide differently.
        assert other["figures"] == first["figures"]
        assert other["keeps"] == expected["keeps"]


def test_what_waits_in_files_comes_back_to_the_bit(of_two):
    for found in of_two:
        assert found["in files"]["figures"] == found["tied"]["figures"]
        for name, weight in found["tied"]["weights"].items():
            assert torch.equal(found["in files"]["weights"][name], weight)


def test_each_process_holds_its_shards(alone, of_two):
    held = alone["tied"]["held"]
    for name in ("student.gradients", "student.parameters", "student.optimizer"):
        shares = [found["tied"]["held"][name] for found in of_two]
        # What cannot be cut evenly is padded by a row.
        assert held[name] <= sum(shares) < 1.05 * held[name]


def test_autocasts_products_are_gathered_narrow_to_the_same_bits(of_two):
    for found in of_two:
        assert found["gathered"]["same"]
        assert found["gathered"]["dtypes"] == [(torch.bfloat16, torch.float32), (torch.float32, torch.float32)]
        narrow, wide = found["gathered"]["kept"]
        # No copies of the weights by autocast, which the backward pass would keep of all layers.
        assert narrow < wide / 2


@pytest.mark.parametrize("name", ["sharded", "two copies"])
def test_four_processes_train_as_one(alone, of_four, name):
    _assert_same([found[name] for found in of_four], alone["tied"], 4)
