"""The same training by one process and by several: tiny models whose shards are uneven, groups and lengths too; with
adapters, where that is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gadcore.config.settings import AlgorithmSettings, DiscriminatorSettings, MemorySettings, StudentSettings
from gadcore.distributed import fsdp
from gadcore.distributed.world import ALONE, World
from gadcore.memory.colocation import Colocation
from gadcore.models.adapter import is_adapted, own_parameters
from gadcore.models.discriminator import Discriminator
from gadcore.models.preference import preference_backward, sequence_logprobs
from gadcore.models.spec import ModelSpec
from gadcore.models.student import Student
from gadcore.rollout.weights import fingerprint
from tests.support.adapters import trained
from tests.support.builders import groups
from tests.support.tiny import FAMILIES, tiny_tokenizer

# Every matrix has rows that neither 2 nor 4 divide, but for the attention's.
SHAPE = dict(
    vocab_size=323,
    hidden_size=60,
    intermediate_size=101,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=256,
    initializer_range=0.1,
    bos_token_id=None,
    eos_token_id=2,
    pad_token_id=2,
)


def save_uneven(folder: Path, kind: str, *, tied: bool) -> Path:
    """A model directory of such a model."""
    model, config, special = FAMILIES[kind]
    torch.manual_seed(3)
    layers = {"num_hidden_layers": len(special["layer_types"])} if "layer_types" in special else {}
    made = model(config(**(SHAPE | layers), tie_word_embeddings=tied, **special)).eval()
    with torch.no_grad():
        for name, p in made.named_parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p), alpha=0.1 if name.endswith("bias") else 0.02)
    made.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Case:
    """count: groups of a batch. offload: memory.offload. autocast: of both models. preference: DPO at the end.
    adapted: which of "student" and "discriminator" have adapters; kept: adapter_base of these."""

    folder: Path
    count: int = 5
    offload: str = "none"
    autocast: str = "none"
    mode: str = "off"
    micro_batch_tokens: int = 90
    loss: str | None = None
    steps: int = 3
    preference: bool = True
    adapted: tuple[str, ...] = ()
    kept: str = "none"

    def adapter(self, owner: str) -> dict[str, Any]:
        """Settings of a model."""
        if owner not in self.adapted:
            return {}
        return {"adapter": "lora", "adapter_rank": 4, "adapter_base": self.kept}


def learners(case: Case, world: World) -> tuple[Student, Discriminator]:
    spec = ModelSpec.resolve(str(case.folder))
    of_both = dict(
        device="cpu", micro_batch_tokens=case.micro_batch_tokens, activation_checkpointing=case.mode, world=world
    )
    student = Student.load(
        spec,
        StudentSettings(lr=1e-3, grad_clip=0.2, autocast=case.autocast, **case.adapter("student")),
        AlgorithmSettings(kl_coef=0.05, importance_cap=2.0, loss=case.loss),
        **of_both,
    )
    adapter = case.adapter("discriminator")
    settings = DiscriminatorSettings(lr=1e-3, grad_clip=0.2, autocast=case.autocast, **adapter)
    base = student.base if adapter else None
    discriminator = Discriminator.load(spec, settings, student=spec, seed=5, base=base, **of_both)
    for seed, learner in enumerate((student, discriminator)):
        # Nothing of a model without adapters.
        trained(learner.model, seed)
    return student, discriminator


def memory_of(case: Case, student: Student, discriminator: Discriminator, place: Path) -> Colocation:
    memory = Colocation(torch.device("cpu"), MemorySettings(offload=case.offload), place, shared=False)
    for learner in (student, discriminator):
        learner.optimizer.allocate()
        memory.add(f"{learner.owner}.optimizer", learner.optimizer.moments)
        memory.add(f"{learner.owner}.parameters", learner.parameter_tensors)
        memory.add_gradients(f"{learner.owner}.gradients", learner.optimizer.parameters)
    memory.begin()
    return memory


def train(case: Case, world: World = ALONE, place: Path | None = None) -> dict[str, Any]:
    """Cross-entropy, steps of GAD, one of DPO. The figures of every step, and the weights at the end, whole; of models
    with adapters a checksum of these after every step."""
    student, discriminator = learners(case, world)
    memory = memory_of(case, student, discriminator, place or case.folder / "offload")
    found: list[dict[str, Any]] = []
    prints: list[list[int]] = []
    batches = [groups(case.count, seed=seed, ragged=True) for seed in range(case.steps + 1)]
    memory.enter("student")
    ce = student.seqkd_backward(batches[-1])
    memory.enter("student_update")
    found.append({"norm": student.step(), "ce": ce.ce})
    memory.enter("student")
    known = sequence_logprobs(student, batches[-1])
    student.freeze_reference(memory.readable(student.local_parameters()))
    memory.add("reference.parameters", student.reference_tensors, frozen=True)
    for batch in batches[:-1]:
        memory.enter("synchronise")
        memory.enter("rollout")
        memory.enter("discriminator")
        scores = discriminator.score(batch, backward=True)
        memory.enter("discriminator_update")
        figures = {"d_norm": discriminator.step(), "d_loss": scores.loss, "margin": scores.margin}
        figures |= {"accuracy": scores.accuracy, "rewards": scores.rewards, "teachers": scores.teacher_scores}
        memory.enter("reference")
        reference = student.reference_logprobs(batch)
        memory.enter("student")
        stats = student.grpo_backward(batch, scores.sample_scores, reference)
        memory.enter("student_update")
        figures["norm"] = student.step()
        found.append(figures | {name: getattr(stats, name) for name in stats._names})
        adapted = [learner for learner in (student, discriminator) if is_adapted(learner.model)]
        prints.append([fingerprint(memory.readable(own.local_parameters()).items()) for own in adapted])
    if case.preference:
        memory.enter("student")
        preferred = preference_backward(student, batches[-1], known, beta=0.3)
        memory.enter("student_update")
        figures = {"norm": student.step(), "known": known}
        found.append(figures | {name: getattr(preferred, name) for name in preferred._names})
    states = memory.summary()["states"]
    weights = {}
    for state, learner in (("student", student), ("discriminator", discriminator)):
        memory.enter(state)
        for name, p in own_parameters(learner.model).items():
            weights[f"{learner.owner}.{name}"] = fsdp.whole(fsdp.local(p.detach()), p).clone()
    memory.enter("rest")
    memory.close()
    held = states["student_update"]
    keeps = (student.keeps, discriminator.keeps)
    return {"figures": found, "weights": weights, "held": held, "prints": prints, "keeps": keeps}


def relative(found: Any, expected: Any) -> float:
    """The worst relative difference of figures, lists and dicts of them; of tensors the difference's norm."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        return max(relative(found[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        assert len(found) == len(expected)
        return max((relative(a, b) for a, b in zip(found, expected, strict=True)), default=0.0)
    if isinstance(expected, torch.Tensor):
        return float((found - expected).norm() / expected.norm())
    # Means and shares may be 0: they are compared as numbers of the size of a loss.
    return abs(found - expected) / max(abs(expected), 0.1)
