"""Models read and written by shards are those that one process reads and writes; what cannot work is told by all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gadcore.config.settings import MemorySettings, StudentSettings
from gadcore.distributed import fsdp
from gadcore.distributed.fsdp import first_row, inside, local, whole
from gadcore.distributed.world import World
from gadcore.memory import resident
from gadcore.memory.colocation import Colocation
from gadcore.models import loading, streaming
from gadcore.models.loading import load_causal_lm, load_discriminator
from gadcore.models.student import Student
from tests.support.builders import groups
from tests.support.ranks import run_ranks
from tests.support.sharding import SHAPE, Case, learners, save_uneven
from tests.support.tiny import FAMILIES, tiny_tokenizer

# Several processes: half a minute to start them.
pytestmark = pytest.mark.slow

HERE = "tests.unit.models.test_sharded_loading"
CPU = torch.device("cpu")
IDS = torch.arange(3, 40)[None]


def load_of(path: Path, world: World, kind: str = "lm"):
    if kind == "lm":
        return load_causal_lm(str(path), "float32", CPU, world)
    return load_discriminator(
        str(path), "float32", device=CPU, seed=5, end_id=2, tokenizer=tiny_tokenizer(), world=world
    )


def two(world: World, folder: Path) -> dict:
    found = {name: loaded(world, folder / name) for name in ("qwen2", "llama", "gemma3", "several files", "no prefix")}
    found["refused"] = {name: refused(world, folder / name) for name in ("nan", "two labels", "lacks", "no weights")}
    case = Case(folder / "qwen2")
    found["host"] = told(lambda: Student.load(str(case.folder), StudentSettings(master="host"), world=world))
    student, discriminator = learners(case, world)
    found["state"] = told(student.state_dict)
    found["away"] = away(world, folder, student)
    found["not finite"] = not_finite(student)
    saved(world, folder, student, discriminator)
    found["unwritable"] = told(lambda: student.save(Path("/proc/nowhere")))
    found["one fails"] = one_fails(world, folder)
    return found


def loaded(world: World, path: Path) -> dict:
    model, judge = load_of(path, world), load_of(path, world, "score")
    with torch.no_grad():
        logits = inside(model, lambda: model.get_output_embeddings()(model.base_model(IDS).last_hidden_state))
        score = inside(judge, lambda: judge.score(judge.base_model(IDS).last_hidden_state))
    fsdp.reshard_all(model)
    return {
        "logits": logits,
        "score": score,
        "names": [name for name, _ in model.named_parameters()],
        "head": whole(local(judge.score.weight.detach()), judge.score.weight).clone(),
        "rows": {name: (first_row(p), len(local(p))) for name, p in judge.named_parameters()},
        "tied": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        "buffers": dict(model.named_buffers()),
        "like": type(model).__name__,
    }


def told(call) -> tuple[str, str]:
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def refused(world: World, path: Path) -> tuple[str, str]:
    return told(lambda: load_of(path, world, "score" if path.name == "two labels" else "lm"))


def away(world: World, folder: Path, student: Student) -> dict:
    """What a model does while its shards are in a file; then they come back."""
    memory = Colocation(CPU, MemorySettings(offload="file"), folder / "offload", shared=False, world=world)
    before = {name: part.clone() for name, part in student.local_parameters().items()}
    memory.add("student.parameters", student.parameter_tensors)
    held = memory.ledger.held.get("student.parameters", 0)
    forward = told(lambda: student.logprobs(student.model, None, 1.0))
    readable = memory.readable(student.local_parameters())
    same = all(torch.equal(readable[name], part) for name, part in before.items())
    memory.enter("student")
    back = all(torch.equal(part, before[name]) for name, part in student.local_parameters().items())
    return {"held": held, "forward": forward, "readable": same, "back": back}


def not_finite(student: Student) -> dict:
    """A gradient that is not finite on one process ends the step on all."""
    before = [local(p).clone() for p in student.optimizer.parameters]
    student.seqkd_backward(groups(4, ragged=True))
    if student.world.rank == 1:
        local(student.optimizer.parameters[0].grad)[0] = torch.inf
    error = told(student.step)
    student.optimizer.adamw.zero_grad()
    return {"error": error, "same": all(map(torch.equal, before, map(local, student.optimizer.parameters)))}


def saved(world: World, folder: Path, student: Student, discriminator) -> None:
    student.save(folder / "saved")
    discriminator.save(folder / "saved-d")
    streaming.save_sharded(student.model, tiny_tokenizer(), folder / "saved-parts", world, file_bytes=100_000)


def one_fails(world: World, folder: Path) -> tuple[str, str]:
    """A process whose disk is full tells all of them."""
    settings = MemorySettings(offload="file")
    place = folder / "tier" if world.rank == 0 else Path("/proc/nowhere")
    memory = Colocation(CPU, settings, place, shared=False, world=world)
    return told(lambda: memory.add("student.parameters", lambda: [torch.ones(8)]))


@pytest.fixture(scope="module")
def folder(module_folder: Path) -> Path:
    save_uneven(module_folder / "qwen2", "qwen2", tied=True)
    save_uneven(module_folder / "gemma3", "gemma3", tied=True)
    llama = save_uneven(module_folder / "llama", "llama", tied=False)
    model = AutoModelForCausalLM.from_pretrained(llama)
    _beside(model, module_folder / "several files", max_shard_size="100KB")
    _beside(model.base_model, module_folder / "no prefix")
    # The head is no part of the backbone alone.
    extra = {"lm_head.weight": model.lm_head.weight.detach()}
    weights = module_folder / "no prefix" / "model.safetensors"
    save_file(load_file(weights) | extra, weights, {"format": "pt"})
    (module_folder / "no prefix" / "config.json").write_text((llama / "config.json").read_text())
    for name, change in {
        "nan": {"model.layers.1.mlp.up_proj.weight": torch.full((101, 60), torch.nan)},
        "two labels": {"score.weight": torch.zeros(2, 60)},
        "lacks": {"model.norm.weight": None},
    }.items():
        tensors = load_file(llama / "model.safetensors") | change
        _beside(model, module_folder / name)
        kept = {key: tensor for key, tensor in tensors.items() if tensor is not None}
        save_file(kept, module_folder / name / "model.safetensors", {"format": "pt"})
    _beside(model, module_folder / "no weights")
    (module_folder / "no weights" / "model.safetensors").unlink()
    return module_folder


def _beside(model, path: Path, **kwargs) -> None:
    model.save_pretrained(path, **kwargs)
    tiny_tokenizer().save_pretrained(path)


@pytest.fixture(scope="module")
def of_two(folder: Path) -> list[dict]:
    return run_ranks(2, f"{HERE}:two", folder, deadline=540)


@pytest.mark.parametrize("name", ["qwen2", "llama", "gemma3", "several files", "no prefix"])
def test_a_model_read_by_slices_is_the_model(folder, of_two, name):
    expected = loaded(World.alone(), folder / name)
    for found in (of[name] for of in of_two):
        torch.testing.assert_close(found["logits"], expected["logits"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found["score"], expected["score"], rtol=1e-5, atol=1e-5)
        assert torch.equal(found["head"], expected["head"])
        assert found["names"] == expected["names"] and found["tied"] == expected["tied"] == (
            name in ("qwen2", "gemma3")
        )
        assert found["buffers"].keys() == expected["buffers"].keys()
        assert all(torch.equal(buffer, expected["buffers"][key]) for key, buffer in found["buffers"].items())
        assert found["like"] == f"FSDP{expected['like']}"
    for key, (_, rows) in expected["rows"].items():
        (first, here), (second, there) = (of[name]["rows"][key] for of in of_two)
        assert (first, second, here + there) == (0, here, rows) and 0 <= here - there <= 1


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nan", "NaN or infinite values in model.layers.1.mlp.up_proj.weight"),
        ("two labels", "has a head of 2 labels"),
        ("lacks", "lacks the weights ['model.norm.weight']"),
        ("no weights", "has no model.safetensors"),
    ],
)
def test_all_processes_refuse_a_bad_model(of_two, name, sentence):
    for found in of_two:
        kind, message = found["refused"][name]
        assert kind == "UserError" and sentence in message


def test_masters_of_one_process_are_refused(of_two):
    for found in of_two:
        assert found["host"][0] == "UserError" and "student.master = host keeps whole masters" in found["host"][1]


def test_the_whole_state_is_refused(of_two):
    for found in of_two:
        assert found["state"][0] == "UserError" and "sharded over 2 processes" in found["state"][1]


def test_a_model_whose_shards_are_away_computes_nothing(of_two):
    for found in of_two:
        away = found["away"]
        assert away["forward"][0] == "RuntimeError" and "parameters are away" in away["forward"][1]
        assert away["held"] == 0 and away["readable"] and away["back"]


def test_a_gradient_that_is_not_finite_ends_the_step_everywhere(of_two):
    for found in of_two:
        kind, message = found["not finite"]["error"]
        assert kind == "UserError" and "gradient of the student is not finite" in message
        assert found["not finite"]["same"]


def test_a_disk_that_is_full_for_one_is_told_by_all(of_two):
    for found in of_two:
        assert found["one fails"][0] == "UserError" and "/proc/nowhere" in found["one fails"][1]


def test_what_is_saved_is_what_one_process_saves(folder, of_two, tmp_path):
    case = Case(folder / "qwen2")
    for learner, name in zip(learners(case, World.alone()), ("saved", "saved-d"), strict=True):
        learner.save(tmp_path / name)
        ours, expected = folder / name, tmp_path / name
        assert {f.name for f in ours.iterdir()} == {f.name for f in expected.iterdir()}
        for file in expected.glob("*.json"):
            assert json.loads((ours / file.name).read_text()) == json.loads(file.read_text()), file.name
        one, other = load_file(ours / "model.safetensors"), load_file(expected / "model.safetensors")
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        assert (ours / "model.safetensors").stat().st_mode == (expected / "model.safetensors").stat().st_mode
    parts = sorted((folder / "saved-parts").glob("*.safetensors"))
    assert len(parts) > 2 and all(part.stat().st_size < 110_000 for part in parts)
    again = AutoModelForCausalLM.from_pretrained(folder / "saved-parts")
    reference = AutoModelForCausalLM.from_pretrained(case.folder)
    assert all(map(torch.equal, again.state_dict().values(), reference.state_dict().values()))


def test_all_processes_tell_of_a_folder_that_cannot_be_written(of_two):
    for found in of_two:
        assert found["unwritable"][0] == "UserError" and "no model can be written in /proc" in found["unwritable"][1]


def grown(world: World, path: Path) -> dict:
    """Bytes of the shard, and what reading it and then the checks took at most above what was there before."""
    torch.ones(8).sum()
    resident.trim()
    before = resident.rss()
    assert resident.reset_peak()
    read, found = loading.load_sharded, {}

    def watched(*args):
        made = read(*args)
        found["read"] = resident.peak() - before
        return made

    loading.load_sharded = watched
    model = load_causal_lm(str(path), "float32", CPU, world)
    shard = sum(local(p).nbytes for p in model.parameters())
    layer = sum(p.numel() * 4 for p in model.model.layers[0].parameters())
    return {**found, "shard": shard, "checks": resident.peak() - before, "layer": layer}


@pytest.mark.by_hand
def test_loading_takes_little_more_than_the_shard(tmp_path):
    """Of three quarters of a gigabyte in two shards. The checks have embedding and head whole, and two layers."""
    kind, config, _ = FAMILIES["llama"]
    shape = dict(hidden_size=1024, num_hidden_layers=12, num_attention_heads=16, num_key_value_heads=4)
    large = config(**(SHAPE | shape | dict(intermediate_size=3500, vocab_size=20001)), tie_word_embeddings=False)
    kind(large).save_pretrained(tmp_path / "large", max_shard_size="300MB")
    tiny_tokenizer().save_pretrained(tmp_path / "large")
    for rank, found in enumerate(run_ranks(2, f"{HERE}:grown", tmp_path / "large", deadline=300)):
        mib = {name: size // 2**20 for name, size in found.items()}
        print(f"rank {rank}: a shard of {mib['shard']} MiB, at most {mib['read']} while it was read, {mib['checks']} "
              "while it was checked")  # fmt: skip
        ends = 2 * 20001 * 1024 * 4
        assert found["read"] < found["shard"] + (64 << 20)
        # Gathered, each lies in what has arrived and in its parameters.
        assert found["checks"] < found["shard"] + 4 * ends + 4 * found["layer"]
