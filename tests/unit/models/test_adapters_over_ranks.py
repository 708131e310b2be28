"""Models with adapters over several processes: each has all of them, takes its share of a batch, and trains as one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gadcore.config.settings import AlgorithmSettings, Config, StudentSettings
from gadcore.distributed import fsdp
from gadcore.distributed.world import ALONE, World
from gadcore.errors import UserError
from gadcore.models.adapter import own_parameters
from gadcore.models.learner import ADAPTER, Learner
from gadcore.models.peft_format import WEIGHTS
from gadcore.models.student import Student
from gadcore.rollout.engine import SampleRequest, make_engine
from tests.support.builders import TEMPLATE, groups
from tests.support.ranks import run_ranks
from tests.support.sharding import Case, learners, relative, save_uneven, train

# Several processes: some seconds to start them.
pytestmark = pytest.mark.slow

HERE = "tests.unit.models.test_adapters_over_ranks"
BOTH = ("student", "discriminator")


def cases(folder: Path) -> dict[str, Case]:
    both = Case(folder / "qwen2", adapted=BOTH, steps=2)
    return {
        "one base": both,
        "the student's alone": Case(folder / "qwen2", adapted=("student",), steps=1),
        "the discriminator's alone": Case(folder / "qwen2", adapted=("discriminator",), steps=1, mode="selective"),
        "an idle process, eight bits": Case(
            folder / "qwen2", adapted=BOTH, kept="int8", count=1, micro_batch_tokens=10**4, steps=1, offload="file"
        ),
    }


def kept_gradients(learner: Learner) -> dict[str, torch.Tensor]:
    """Of the next step, as its update reads them: summed, and clipped."""
    found: dict[str, torch.Tensor] = {}
    update = learner.optimizer._update

    def kept() -> None:
        found.update({name: p.grad.clone() for name, p in own_parameters(learner.model).items() if p.grad is not None})
        update()

    learner.optimizer._update = kept
    return found


def gradients(world: World, case: Case) -> dict[str, torch.Tensor]:
    """Of a GAD step of both models; the base under them has none."""
    student, discriminator = learners(case, world)
    student.freeze_reference()
    batch = groups(case.count, seed=1, ragged=True)
    scores = discriminator.score(batch, backward=True)
    student.grpo_backward(batch, scores.sample_scores)
    found = {}
    for learner in (student, discriminator):
        made = kept_gradients(learner)
        learner.step()
        assert len(made) == len(own_parameters(learner.model))
        assert all(p.grad is None for p in learner.model.parameters())
        found |= {f"{learner.owner}.{name}": gradient for name, gradient in made.items()}
    return found


def sampled(world: World, case: Case) -> list:
    """By Hugging Face's engine, each process its share: (tokens, log-probs), and whom it has told of them."""
    student, _ = learners(case, world)
    config = Config.model_validate({"rollout": {"engine": "hf"}, "student": case.adapter("student")})
    engine = make_engine(config, "", student.model, TEMPLATE, world=world)
    own = []
    draw = engine._one
    engine._one = lambda request, *others: own.append(request.seed) or draw(request, *others)
    told: dict = {}
    asked = [SampleRequest(group.prompt.token_ids, 2, 10 + i) for i, group in enumerate(groups(3))]
    drawn = engine.generate(asked, temperature=0.8, max_tokens=8, done=told.__setitem__)
    assert told == dict(enumerate(drawn))
    assert own == [10 + i for i in range(3)][world.rank :: world.size]
    return [(sample.token_ids, sample.logprobs) for samples in drawn for sample in samples]


def saved(world: World, case: Case, place: Path) -> None:
    """A model's directory, and its state to go on from, each written once."""
    student, discriminator = learners(case, world)
    for learner in (student, discriminator):
        folder = place / learner.owner
        if world.is_first:
            folder.mkdir(parents=True)
        world.barrier()
        learner.save(folder)
        learner.save_state(folder)
    student.load_state(place / "student")


def refused(world: World, folder: Path) -> list[str]:
    """What only one process cannot read ends all of them."""
    adapter = folder / f"of-rank-{world.rank}"
    settings = StudentSettings(adapter="lora", adapter_from=str(adapter) if world.rank else None)
    told = []
    try:
        Student.load(str(folder / "qwen2"), settings, AlgorithmSettings(), device="cpu", world=world)
    except UserError as error:
        told.append(str(error))
    return told


def of_rank(world: World, folder: Path) -> dict:
    found: dict = {name: train(case, world, folder / f"{name}-{world.rank}") for name, case in cases(folder).items()}
    case = cases(folder)["one base"]
    found["gradients"], found["sampled"] = gradients(world, case), sampled(world, case)
    saved(world, case, folder / f"saved-{world.size}")
    if world.size > 1:
        found["refused"] = refused(world, folder)
        alone = learners(cases(folder)["the student's alone"], world)
        found["sharded"] = [fsdp.is_sharded(learner.model) for learner in alone]
    return found


@pytest.fixture(scope="module")
def folder(module_folder: Path) -> Path:
    save_uneven(module_folder / "qwen2", "qwen2", tied=True)
    return module_folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict:
    """In a process of its own as well: vLLM in this one, from an earlier test, would change the last bits."""
    return run_ranks(1, f"{HERE}:of_rank", folder, deadline=300)[0]


@pytest.fixture(scope="module")
def two(folder: Path, alone: dict) -> list[dict]:
    return run_ranks(2, f"{HERE}:of_rank", folder, deadline=300)


@pytest.mark.parametrize("name", list(cases(Path())))
def test_two_processes_train_as_one(alone, two, name) -> None:
    expected = alone[name]
    for found in (rank[name] for rank in two):
        print(name, *(relative(found[what], expected[what]) for what in ("figures", "weights")))
        assert relative(found["figures"], expected["figures"]) < 1e-5
        assert relative(found["weights"], expected["weights"]) < 1e-5
        assert found["keeps"] == expected["keeps"]


@pytest.mark.parametrize("name", list(cases(Path())))
def test_all_have_the_same_adapters_after_every_step(alone, two, name) -> None:
    one, other = (rank[name]["prints"] for rank in two)
    assert one == other
    assert len({tuple(step) for step in one}) == len(one) == len(alone[name]["prints"])
    # Figures too, or processes would decide differently.
    assert two[0][name]["figures"] == two[1][name]["figures"]


def test_gradients_are_those_of_one_process(alone, two) -> None:
    expected = alone["gradients"]
    assert any(name.endswith("lora_A") for name in expected) and "discriminator.score.weight" in expected
    for rank in two:
        assert rank["gradients"].keys() == expected.keys()
        for name, gradient in expected.items():
            assert relative(rank["gradients"][name], gradient) < 1e-5, name
            assert torch.equal(rank["gradients"][name], two[0]["gradients"][name])


def test_each_holds_all_of_an_adapter_and_its_share_of_other_weights(alone, two) -> None:
    for rank in two:
        for name in ("student.parameters", "student.gradients", "student.optimizer"):
            assert rank["one base"]["held"][name] == alone["one base"]["held"][name]
            assert rank["the student's alone"]["held"][name] == alone["the student's alone"]["held"][name]
            share = rank["the discriminator's alone"]["held"][name] / alone["the discriminator's alone"]["held"][name]
            assert 0.45 < share < 0.55


def test_each_draws_its_share_and_has_all_samples(alone, two) -> None:
    for rank in two:
        assert [ids for ids, _ in rank["sampled"]] == [ids for ids, _ in alone["sampled"]]
        assert relative([list(p) for _, p in rank["sampled"]], [list(p) for _, p in alone["sampled"]]) < 1e-5


def test_one_writes_what_one_process_writes(folder, two) -> None:
    for owner in BOTH:
        one, of_two = (folder / f"saved-{size}" / owner for size in (1, 2))
        files = {path.relative_to(one) for path in one.rglob("*")}
        assert files == {path.relative_to(of_two) for path in of_two.rglob("*")}
        for name in ("model.safetensors", f"{ADAPTER}/{WEIGHTS}", f"{owner}-state.safetensors"):
            ours, theirs = load_file(of_two / name), load_file(one / name)
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_what_one_process_cannot_read_ends_all(two) -> None:
    for rank in two:
        (sentence,) = rank["refused"]
        assert "of-rank-1 is no folder of an adapter" in sentence


def test_a_model_without_adapters_is_sharded_beside_one_with(two) -> None:
    assert [rank["sharded"] for rank in two] == [[False, True]] * 2


def test_alone_nothing_is_exchanged(folder, monkeypatch) -> None:
    """A process of one: no sum, no copy of a gradient."""
    monkeypatch.setattr("gadcore.distributed.gradients._add_up", lambda *args: pytest.fail("nobody to add up with"))
    assert gradients(ALONE, cases(folder)["one base"])
