"""The owner of the served discriminator, ended at every moment of an update, a checkpoint and a restore."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from gadcore.checkpoint import store
from gadcore.errors import UserError
from gadcore.integrations.service.journal import Journal
from gadcore.integrations.service.owner import Owner, Request
from gadcore.integrations.service.refused import Refused
from gadcore.integrations.service.rows import Rows
from gadcore.integrations.service.schema import GroupIn
from gadcore.integrations.service.settings import ServiceConfig
from gadcore.models.discriminator import Discriminator
from tests.support.service import settings
from tests.support.service_client import group
from tests.support.tiny import save_tiny


class Killed(BaseException):
    """The process ends here."""


def started(folder: Path, **changed: Any) -> Owner:
    config = ServiceConfig.model_validate(settings(folder, **changed))
    discriminator = Discriminator.load(config.discriminator.model, config.discriminator, device="cpu", seed=3)
    owner = Owner(discriminator, config, on_update=lambda scores, groups: None)
    owner.notes = owner.begin(lambda model: None)  # type: ignore[attr-defined]
    return owner


def request(name: str) -> Request:
    plain = {key: value for key, value in asdict(group(name)).items() if value is not None}
    return Request(name, f"digest {name}", [Rows(ServiceConfig().data).resolve(GroupIn.model_validate(plain))])


def train(owner: Owner, *names: str) -> dict[str, Any]:
    """As the worker does: what is known is not trained again."""
    found, new = {}, []
    for name in names:
        entry = owner.journal.find(name)
        if entry is None:
            new.append(request(name))
        else:
            found[name] = entry.answer
    if new:
        found |= owner.train(new, [g for r in new for g in owner.groups_of(r.groups)])
    if owner.checkpoint_due():
        owner.checkpoint_own()
    return found


def weights(owner: Owner) -> dict[str, list]:
    return {name: tensor.tolist() for name, tensor in owner.discriminator.state_dict().items()}


@pytest.fixture(scope="module")
def uninterrupted(module_folder: Path) -> tuple[dict[str, list], dict[str, Any]]:
    """(weights and moments, answers) of seven updates in one process."""
    owner = started(module_folder / "whole")
    answers: dict[str, Any] = {}
    for k in range(7):
        answers |= train(owner, f"{k}a", f"{k}b")
    return weights(owner), answers


# Whose function ends the process before or after it has done its work, and in which update. Checkpoints come after 5.
MOMENTS: dict[str, tuple[Any, str, bool, int]] = {
    "before it is written down": (Journal, "begin", False, 2),
    "after it was written down": (Journal, "begin", True, 7),
    "before the step": (Discriminator, "step", False, 6),
    "after the step": (Discriminator, "step", True, 3),
    "after the answer was written down": (Journal, "end", True, 7),
    "in a checkpoint": (store, "_write", True, 5),
    "before texts are forgotten": (Journal, "forget", False, 5),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_at_any_moment_neither_loses_nor_repeats_an_update(
    moment: str, uninterrupted: tuple, tmp_path: Path, monkeypatch
) -> None:
    """Whoever got no answer asks again: weights and answers are as without the kill, to the bit."""
    owner, name, after, at = MOMENTS[moment]
    one = started(tmp_path)
    answered: dict[str, Any] = {}
    for k in range(at - 1):
        answered |= train(one, f"{k}a", f"{k}b")

    def killed(original: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            if after:
                original(*args, **kwargs)
            raise Killed

        return call

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killed(getattr(owner, name)))
        with pytest.raises(Killed):
            train(one, f"{at - 1}a", f"{at - 1}b")
    two = started(tmp_path)
    for k in range(7):
        again = train(two, f"{k}a", f"{k}b")
        assert all(again[key] == answered.get(key, again[key]) for key in again)
        answered |= again
    expected, answers = uninterrupted
    assert weights(two) == expected and answered == answers
    assert two.version == 7
    two.close()
    assert started(tmp_path).version == 7


def test_an_update_that_ends_the_process_every_time_is_given_up(tmp_path: Path, monkeypatch) -> None:
    def ends(*_: Any, **__: Any) -> None:
        raise Killed

    owner = started(tmp_path)
    train(owner, "a")
    with monkeypatch.context() as patch:
        patch.setattr(Discriminator, "step", ends)
        with pytest.raises(Killed):
            train(owner, "b")
        for _ in range(2):
            with pytest.raises(Killed):
                # The update before it comes first, and needs its step.
                _only(patch, "b", ends)
                started(tmp_path)
    owner = started(tmp_path)
    entry = owner.journal.find("b")
    assert owner.version == 1 and entry is not None and entry.state == "failed"
    assert "the service ended 3 times while it was trained on this" in entry.answer["message"]
    assert train(owner, "c")["c"]["version"] == 2


def _only(patch: Any, name: str, ends: Callable) -> None:
    """Ends the process in the update of one request alone."""
    patch.undo()
    make = Owner._make

    def dies(self: Owner, version: int, requests: list[Request], groups: list) -> Any:
        return ends() if requests[0].id == name else make(self, version, requests, groups)

    patch.setattr(Owner, "_make", dies)


def test_a_restore_goes_back_and_outlasts_a_kill_between_its_two_halves(tmp_path: Path, monkeypatch) -> None:
    owner = started(tmp_path)
    train(owner, "a")
    saved, kept = owner.checkpoint(), weights(owner)
    first = train(owner, "b")
    train(owner, "c")
    assert owner.restore(saved) == 4 and weights(owner) == kept
    again = train(owner, "b")
    assert again["b"]["version"] == 5 and again["b"]["groups"] == first["b"]["groups"]
    with pytest.raises(Refused, match="there is no checkpoint of version 77: there are"):
        owner.restore(77)
    monkeypatch.setattr(Journal, "restored", lambda *_: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        owner.restore(saved)
    monkeypatch.undo()
    two = started(tmp_path)
    assert two.version == 6 and weights(two) == kept and two.journal.find("b") is None


def test_other_settings_wait_until_nothing_has_to_be_made_again(tmp_path: Path) -> None:
    owner = started(tmp_path)
    train(owner, "a")
    with pytest.raises(UserError, match="has 1 updates since its last checkpoint, made with other settings"):
        started(tmp_path, discriminator__lr=5e-4)
    started(tmp_path).close()
    assert started(tmp_path, discriminator__lr=5e-4).version == 1
    with pytest.raises(UserError, match="belongs to the discriminator"):
        started(tmp_path, discriminator__model=str(save_tiny(tmp_path / "other")))


def test_a_damaged_checkpoint_is_told_and_an_older_one_taken(tmp_path: Path) -> None:
    owner = started(tmp_path)
    for k in range(11):
        train(owner, str(k))
    expected = weights(owner)
    newest = store.latest(owner.folder / "checkpoints")
    assert newest is not None and newest.name == "step-000010"
    file = newest / "discriminator.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    two = started(tmp_path)
    assert weights(two) == expected and two.version == 11
    assert "discriminator.safetensors has" in two.notes[0]  # type: ignore[attr-defined]
    assert "6 updates since the checkpoint of version 5" in two.notes[1]  # type: ignore[attr-defined]


def test_scores_that_are_not_finite_train_nothing(tmp_path: Path) -> None:
    owner = started(tmp_path)
    train(owner, "a")
    with torch.no_grad():
        owner.discriminator.model.score.weight.fill_(float("nan"))
    with pytest.raises(Refused, match="nothing was trained: the discriminator's scores are not finite: go back to a"):
        train(owner, "b")
    assert owner.version == 1 and all(p.grad is None for p in owner.discriminator.model.parameters())


def test_a_full_memory_trains_nothing_and_the_next_update_is_made(tmp_path: Path, monkeypatch) -> None:
    owner = started(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Discriminator, "score", lambda *_, **__: torch.tensor([]).new_empty(1 << 60))
        with pytest.raises(Refused, match="nothing was trained: out of memory in state discriminator, which needs"):
            train(owner, "a")
        with pytest.raises(UserError, match="out of memory in state discriminator"):
            owner.score([])
    entry = owner.journal.find("a")
    assert owner.version == 0 and entry is not None and entry.state == "failed"
    assert train(owner, "b")["b"]["version"] == 1


def test_asleep_the_model_waits_in_a_file_and_comes_back_as_it_was(tmp_path: Path) -> None:
    owner = started(tmp_path, memory__offload="file")
    train(owner, "a")
    owner.sleep()
    assert all(p.numel() == 0 for p in owner.discriminator.model.parameters()) and owner.asleep
    saved = owner.checkpoint()
    owner.wake()
    assert train(owner, "b")["b"]["version"] == 2
    owner.restore(saved)
    plain = started(tmp_path / "plain")
    train(plain, "a")
    owner._memory.enter("discriminator_update")
    assert weights(owner) == weights(plain)
