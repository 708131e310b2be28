"""Student and discriminator in shards over several processes train as they do in one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

import gadcore.models.learner as learner_module
from gadcore.data.groups import packed
from gadcore.distributed import fsdp
from gadcore.distributed.fsdp import local
from gadcore.distributed.world import World
from gadcore.models.activations import bytes_per_token
from gadcore.models.policy_loss import LossInputs
from gadcore.models.preference import preference_backward, sequence_logprobs
from gadcore.models.shallow import decoder_layers
from tests.support.builders import groups
from tests.support.ranks import run_ranks
from tests.support.sharding import Case, learners, relative, save_uneven, train

# Several processes: half a minute to start them.
pytestmark = pytest.mark.slow

HERE = "tests.unit.models.test_sharded"
AUTOCAST = "autocast, some recomputed"
LOSS = f"{HERE}:reinforce"


def reinforce(inputs: LossInputs) -> torch.Tensor:
    return -(inputs.token_advantages * inputs.logprob).sum() / inputs.denominator


def cases(folder: Path) -> dict[str, Case]:
    tied, untied = Case(folder / "qwen2"), Case(folder / "llama")
    return {
        "tied": tied,
        "in files": replace(tied, offload="file"),
        "untied, all recomputed": replace(untied, mode="full"),
        "an idle process, own loss": replace(untied, count=1, micro_batch_tokens=10**4, mode="auto", loss=LOSS),
        # Without DPO: its differences of whole responses' log-probs have three digits in bfloat16.
        AUTOCAST: replace(tied, autocast="bfloat16", mode="selective", preference=False),
    }


def two(world: World, folder: Path) -> dict:
    found = {name: train(case, world, folder / f"{name}-{world.rank}") for name, case in cases(folder).items()}
    found["others"] = other_passes(world, cases(folder)["tied"])
    found["gathered"] = gathered_narrow(world, Case(folder / "llama", autocast="bfloat16"))
    return found


def other_passes(world: World, case: Case) -> dict:
    """Log-probs of samples, and a step of DPO."""
    policy, _ = learners(case, world)
    batch = groups(case.count, seed=2, ragged=True)
    drawn = [logprob.tolist() for group in policy.sample_logprobs(batch) for logprob in group]
    known = sequence_logprobs(policy, batch)
    stats = preference_backward(policy, batch, [[value - 1.0 for value in row] for row in known], 0.1)
    figures = {name: getattr(stats, name) for name in stats._names}
    return {"drawn": drawn, "known": known, "figures": figures, "norm": policy.step()}


def gathered_narrow(world: World, case: Case) -> dict:
    """Gradients under autocast, with parameters gathered in its dtype and in their own, and what is kept of a token."""
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
        layer, model = decoder_layers(policy.model)[0], policy.model
        layer.unshard()
        model.unshard()
        parts = (layer.self_attn.q_proj, model.lm_head, layer.input_layernorm, model.model.embed_tokens)
        dtypes.append([part.weight.dtype for part in parts])
        fsdp.reshard_all(model)
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
    """In a process of its own as well: vLLM in this one, from an earlier test, would change the last bits."""
    return run_ranks(1, f"{HERE}:by_itself", folder, deadline=540)[0]


def by_itself(_: World, folder: Path) -> dict:
    found = {name: train(case) for name, case in cases(folder).items() if name != AUTOCAST}
    # What bfloat16 rounds depends on what is multiplied together: one process cuts the batch as two do.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learner_module, "packed", cut_for_two)
        return found | {AUTOCAST: train(cases(folder)[AUTOCAST])}


def cut_for_two(*args, rank, size, **kwargs):
    return (micro for r in range(2) for micro in packed(*args, rank=r, size=2, **kwargs) if not micro.idle)


@pytest.fixture(scope="module")
def of_two(folder: Path) -> list[dict]:
    return run_ranks(2, f"{HERE}:two", folder, deadline=540)


@pytest.fixture(scope="module")
def of_four(folder: Path) -> list[dict]:
    return run_ranks(4, f"{HERE}:four", folder, deadline=540)


@pytest.mark.parametrize("name", list(cases(Path())))
def test_two_processes_train_as_one(alone, of_two, name):
    # AdamW's first steps are of one size whatever the gradient's: where it is next to nothing, its rounding counts.
    _assert_same([found[name] for found in of_two], alone[name], 1e-4 if name == AUTOCAST else 1e-5)


def _assert_same(found: list[dict], expected: dict, weights: float = 1e-5) -> None:
    """The last step may be DPO's: its figures are small differences of log-probs of whole responses, after steps that
    have rounded."""
    first = found[0]
    *ours, last = first["figures"]
    *theirs, their_last = expected["figures"]
    print(relative(ours, theirs), relative(last, their_last), relative(first["weights"], expected["weights"]))
    assert relative(ours, theirs) < 1e-5
    assert relative(last, their_last) < 5e-5
    assert relative(first["weights"], expected["weights"]) < weights
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


def test_other_passes_of_two_processes_are_those_of_one(folder, of_two):
    expected = other_passes(World.alone(), cases(folder)["tied"])
    for found in of_two:
        assert relative(found["others"], expected) < 1e-5


def test_autocasts_products_are_gathered_narrow_to_the_same_bits(of_two):
    for found in of_two:
        assert found["gathered"]["same"]
        assert found["gathered"]["dtypes"] == [[torch.bfloat16] * 2 + [torch.float32] * 2, [torch.float32] * 4]
        # Copies of the weights that autocast makes, and that the backward pass would keep of all layers.
        narrow, wide = found["gathered"]["kept"]
        matrices = 3 * (2 * 60 * 64 + 2 * 60 * 32 + 3 * 60 * 101)
        assert 64 * (wide - narrow) == pytest.approx(2 * matrices, rel=0.02)


@pytest.mark.parametrize("name", ["sharded", "two copies"])
def test_four_processes_train_as_one(alone, of_four, name):
    _assert_same([found[name] for found in of_four], alone["tied"])
