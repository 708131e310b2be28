"""The door for programs of one's own: text in, one step a call, state out, one's own model and optimizer."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import gadcore
from gadcore import AlgorithmSettings, Discriminator, DiscriminatorSettings, Group, Student, StudentSettings
from gadcore.errors import UserError
from tests.support import builders
from tests.support.runs import ROOT
from tests.support.tiny import save_tiny, tiny_tokenizer

TEXTS = [
    ("Name a city.", "Paris.", ["It is a city on the Seine.", "Zero", ""], [True, False, False]),
    ("What boils?", "Water boils at one hundred degrees.", ["Stop", "Paris."], [True, True]),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model")


def load(folder: Path, lr: float = 1e-3) -> Discriminator:
    return Discriminator.load(str(folder), DiscriminatorSettings(lr=lr), device="cpu", seed=3)


def text_groups(d: Discriminator | Student) -> list[Group]:
    return [d.group(*texts) for texts in TEXTS]


IMPORTED = """
import json, os, sys, threading, time
before, modules = dict(os.environ), set(sys.modules)
for line in sys.stdin.read().splitlines():
    start = time.perf_counter()
    exec(line)
    seconds = time.perf_counter() - start
    print(json.dumps({
        "seconds": seconds,
        "modules": len(set(sys.modules) - modules),
        "heavy": sorted({"torch", "transformers", "vllm", "fastapi", "uvicorn"} & set(sys.modules)),
        "changed": sorted(name for name in {*before, *os.environ} if before.get(name) != os.environ.get(name)),
        "threads": threading.active_count(),
    }))
"""
LINES = [
    "import gadcore",
    "from gadcore.integrations.client import DiscriminatorClient",
    "from gadcore.kernels.linear_grpo_loss import linear_grpo_loss",
    "from gadcore import Discriminator, Student",
]
# Set by the inductor of torch, as transformers imports it: `from transformers import AutoModelForCausalLM` alone does.
OF_TRANSFORMERS = ["TORCHINDUCTOR_CACHE_DIR"]


def test_imports_start_nothing_and_set_nothing() -> None:
    """One line after the other in a clean process: what each has loaded and changed since the process began."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OMP", "TORCH", "HF_", "TOKENIZERS", "GADCORE"))}
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED], env=env | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        input="\n".join(LINES),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    print(*zip(LINES, found, strict=True), sep="\n")
    assert [each["heavy"] for each in found] == [[], [], ["torch"], ["torch", "transformers"]]
    assert [each["changed"] for each in found] == [[], [], [], OF_TRANSFORMERS]
    assert all(each["threads"] == 1 for each in found) and found[0]["modules"] < 20
    assert found[0]["seconds"] < 0.5


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert {"Discriminator", "Student"} <= set(dir(gadcore))
    with pytest.raises(AttributeError, match="Discriminatr"):
        gadcore.Discriminatr  # noqa: B018


def test_a_group_of_text_has_the_ids_of_a_training_row(folder: Path) -> None:
    d = load(folder)
    (made, _), template = text_groups(d), builders.TEMPLATE
    assert made.prompt.token_ids == template.prompt_ids([{"role": "user", "content": "Name a city."}])
    assert made.teacher.token_ids == template.response_ids("Paris.", finished=True)
    assert [s.token_ids for s in made.samples] == [
        template.response_ids(text, finished=end) for text, end in zip(TEXTS[0][2], TEXTS[0][3], strict=True)
    ]
    marked = d.group("Name a city.", "Paris.<|im_end|>", ["Paris."])
    assert marked.teacher.token_ids == marked.samples[0].token_ids
    spoken = d.group([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}], "Yes", ["No"])
    assert [m["role"] for m in spoken.prompt.messages] == ["system", "user"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((" ", "Paris.", ["a"]), "the prompt has no text"),
        (([], "Paris.", ["a"]), "must be the user's, found no message at all"),
        (([{"role": "assistant", "content": "x"}], "Paris.", ["a"]), "must be the user's, found 'assistant'"),
        (([{"role": "boss", "content": "x"}], "Paris.", ["a"]), "the role 'boss': use one of system, user"),
        (([{"content": "x"}], "Paris.", ["a"]), "a message must be"),
        (("x", "<|im_end|>", ["a"]), "the teacher's response has no text"),
        (("x", "Paris.", "abc"), "samples is one text"),
        (("x", "Paris.", ["a", "b"], [True]), "finished has 1 entries for 2 samples"),
    ],
)
def test_what_is_no_group_is_told(folder: Path, arguments: tuple, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(folder).group(*arguments)


def test_logprobs_that_do_not_fit_are_told(folder: Path) -> None:
    student = Student.load(str(folder), device="cpu")
    with pytest.raises(UserError, match=r"logprobs has rows of \[1\] numbers, the samples have \[3\] tokens"):
        student.group("x", "Paris.", ["Stop"], logprobs=[[0.0]])


def test_an_update_is_a_score_and_a_step(folder: Path) -> None:
    ours, theirs = load(folder), load(folder)
    for lr in (None, 1e-2, None):
        found = ours.update(text_groups(ours), lr)
        expected = theirs.score(text_groups(theirs), backward=True)
        assert found.grad_norm == theirs.step(lr) > 0
        assert found == expected and found.rewards == theirs_rewards(expected)
    assert all(torch.equal(a, b) for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True))
    before = ours.score(text_groups(ours))
    assert before == ours.score(text_groups(ours)) and before.grad_norm is None
    assert all(p.grad is None for p in ours.model.parameters())


def theirs_rewards(scores: gadcore.Scores) -> list[list[float]]:
    values, rows, at = scores.vector(), [], 0
    for size in scores.sizes:
        rows.append(values[at + 1 : at + 1 + size])
        at += 1 + size
    return rows


def test_text_groups_are_not_remembered(folder: Path) -> None:
    d = load(folder)
    d.update(text_groups(d))
    assert not d._rows
    d.score(builders.groups(2))
    assert len(d._rows) == 2


def test_an_update_that_fails_leaves_weights_and_no_gradient(folder: Path) -> None:
    d = load(folder)
    before = copy.deepcopy(d.model.state_dict())
    long = d.group("word " * 400, "Paris.", ["a"])
    with pytest.raises(UserError, match="a prompt with its teacher's response needs .* its context has 256"):
        d.update([*text_groups(d), long])
    with torch.no_grad():
        d.model.score.weight.mul_(float("inf"))
    with pytest.raises(UserError, match="not finite"):
        d.update(text_groups(d))
    assert all(p.grad is None for p in d.model.parameters())
    d.model.load_state_dict(before)
    assert d.update(text_groups(d)).grad_norm > 0


def test_warmup_learns_to_tell_and_goes_over_all_groups(folder: Path) -> None:
    d = load(folder, lr=3e-3)
    groups = [d.group(f"Name a city, {k}.", "Paris.", ["Zero degrees", "Stop"]) for k in range(6)]
    told: list[gadcore.Scores] = []
    found = d.warmup(groups, steps=15, batch_size=4, seed=1, on_step=told.append)
    assert found == told
    assert [len(s.sizes) for s in found[:4]] == [4, 2, 4, 2]
    assert found[-1].accuracy == 1 and found[-1].loss < found[0].loss / 2
    with pytest.raises(UserError, match="the warmup has no groups"):
        d.warmup([], steps=1)


@pytest.mark.parametrize(
    "make", [load, lambda folder: Student.load(str(folder), StudentSettings(lr=1e-3), device="cpu")]
)
def test_state_goes_out_and_in_to_the_bit(make, folder: Path, tmp_path: Path) -> None:
    def step(learner: Discriminator | Student) -> object:
        if isinstance(learner, Student):
            learner.seqkd_backward(text_groups(learner))
            return learner.step()
        return learner.update(text_groups(learner)).rewards

    a = make(folder)
    step(a)
    file = a.save_state(tmp_path / "checkpoint-7")
    assert file.name == f"{a.owner}-state.safetensors" and [p.name for p in file.parent.iterdir()] == [file.name]
    kept = {name: tensor.clone() for name, tensor in a.state_dict().items()}
    expected = [step(a), step(a)]
    for source in ("folder", "tensors"):
        b = make(folder)
        step(b)
        step(b)
        b.load_state(tmp_path / "checkpoint-7") if source == "folder" else b.load_state_dict(kept)
        assert {name: t.tolist() for name, t in b.state_dict().items()} == {n: t.tolist() for n, t in kept.items()}
        assert [step(b), step(b)] == expected


def test_another_models_state_is_refused(folder: Path, tmp_path: Path) -> None:
    d, other = load(folder), load(save_tiny(tmp_path / "other", kv_heads=2))
    with pytest.raises(UserError, match="the checkpoint holds another discriminator"):
        d.load_state_dict(other.state_dict())
    with pytest.raises(UserError, match="the state has 'model.norm.weight', which no discriminator has"):
        d.load_state_dict({"model.norm.weight": torch.zeros(1)})
    with pytest.raises(UserError, match="cannot read .*nowhere/discriminator-state.safetensors"):
        d.load_state(tmp_path / "nowhere")


def test_a_readers_own_model_and_optimizer(folder: Path) -> None:
    """The same scores and steps as of a model that gadcore has loaded, by an optimizer that torch has made."""
    made = load(folder)
    own = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    own.load_state_dict(made.model.state_dict())
    sgd = torch.optim.SGD(own.parameters(), lr=0.1, momentum=0.9)
    d = Discriminator.wrap(own, tiny_tokenizer(), optimizer=sgd)
    assert d.score(text_groups(d)) == made.score(text_groups(made))
    before = [p.detach().clone() for p in own.parameters()]
    made.score(text_groups(made), backward=True)
    torch.nn.utils.clip_grad_norm_(made.model.parameters(), made.settings.grad_clip)
    d.update(text_groups(d))
    for old, new, other in zip(before, own.parameters(), made.model.parameters(), strict=True):
        torch.testing.assert_close(new, old - 0.1 * other.grad)
    kept = {name: tensor.clone() for name, tensor in d.state_dict().items()}
    assert sum(name.endswith(".momentum_buffer") for name in kept) == len(before)
    expected = d.update(text_groups(d)).rewards
    d.update(text_groups(d))
    d.load_state_dict(kept)
    assert d.update(text_groups(d)).rewards == expected
    with pytest.raises(ValueError, match="must have those parameters of the discriminator"):
        Discriminator.wrap(own, tiny_tokenizer(), optimizer=torch.optim.SGD([before[0]], lr=0.1))
    two = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    with pytest.raises(UserError, match="has no scalar head `score`"):
        Discriminator.wrap(two, tiny_tokenizer())


def test_a_students_log_probs_are_those_of_its_own_forward(folder: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folder)
    student = Student.wrap(
        AutoModelForCausalLM.from_pretrained(folder),
        tiny_tokenizer(),
        StudentSettings(),
        AlgorithmSettings(kl_coef=0),
        temperature=0.7,
        micro_batch_tokens=24,
    )
    groups = text_groups(student)[1:]
    found = student.sample_logprobs(groups)
    for group, rows in zip(groups, found, strict=True):
        for sample, row in zip(group.samples, rows, strict=True):
            ids = torch.tensor([[*group.prompt.token_ids, *sample.token_ids]])
            logits = plain(ids).logits[0, len(group.prompt.token_ids) - 1 : -1] / 0.7
            expected = logits.log_softmax(-1).gather(1, ids[0, len(group.prompt.token_ids) :, None])[:, 0]
            torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-4)
    stats = student.grpo_backward(groups, [[0.1, 0.9]])
    assert stats.loss != 0 and student.step(lr=1e-3) > 0
