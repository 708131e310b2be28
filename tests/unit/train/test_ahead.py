"""Samples one step ahead: of which weights they are, how long it takes, what is refused, and how a run goes on."""

from __future__ import annotations

import copy
import json
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors.torch import load_file

from gadcore.algorithm import STAGES
from gadcore.checkpoint import store
from gadcore.config.loading import load
from gadcore.config.settings import Config
from gadcore.data.batches import Loader
from gadcore.data.groups import Group
from gadcore.errors import UserError
from gadcore.models.discriminator import Discriminator
from gadcore.models.spec import ModelSpec
from gadcore.models.student import Student
from gadcore.rollout.engine import Drawn, Pending, WeightsLost
from gadcore.rollout.hf import HFEngine
from gadcore.rollout.sampler import Sampler
from gadcore.rollout.weights import PlainWeights, fingerprint
from gadcore.run import main
from gadcore.train.ahead import check_elsewhere
from gadcore.train.phases import Phases
from gadcore.train.progress import stages_of
from gadcore.train.trainer import Trainer
from tests.support.builders import groups
from tests.support.rows import Rows
from tests.support.runs import records, tiny_arguments
from tests.support.tiny import save_tiny

STEPS, SLOW_S = 4, 0.25


class Later(Pending):
    def __init__(self, futures: list[Future], lost: int | None) -> None:
        """lost: the place from which on nothing comes."""
        self._futures, self._lost = futures, lost

    def responses(self, places):
        if self._lost is not None and max(places) >= self._lost:
            raise WeightsLost("the sampler was restarted")
        return [self._futures[place].result()[0] for place in places]

    def wait(self) -> None:
        for future in self._futures:
            future.result()


class Elsewhere(HFEngine):
    """Samples from a copy of the weights, beside the trainer, and takes its time: SLOW_S for two prompts.

    drawn: by the seed of a request the fingerprint of the weights that drew it. worked_s: seconds of drawing.
    loses: (which begin() is lost, from 1; from which place on).
    """

    shared = False

    def __init__(self, config, model, template, *, beside: bool = True, loses=(0, 0)) -> None:
        super().__init__(config, "", copy.deepcopy(model), template)
        self.drawn: dict[int, int] = {}
        self.worked_s = 0.0
        self._pool, self._beside, self._loses, self._begun = ThreadPoolExecutor(1), beside, loses, 0
        self._at_work: list[Future] = []

    @classmethod
    def samples_elsewhere(cls, config, device) -> bool:
        return True

    def update_weights(self, source) -> None:
        assert all(one.done() for one in self._at_work), "it samples while it gets other weights"
        own = dict(self.model.named_parameters())
        for name, tensor in source:
            own[name].data.copy_(tensor)

    def generate(self, requests, *, temperature, max_tokens, done=None):
        weights = fingerprint(self.model.named_parameters())
        self.drawn |= {request.seed: weights for request in requests}
        begin = time.perf_counter()
        time.sleep(SLOW_S / 2 * len(requests))
        found = super().generate(requests, temperature=temperature, max_tokens=max_tokens)
        self.worked_s += time.perf_counter() - begin
        return found

    def begin(self, requests, *, temperature, max_tokens):
        self._begun += 1
        how = {"temperature": temperature, "max_tokens": max_tokens}
        if not self._beside:
            return Drawn(self.generate(requests, **how))
        self._at_work = [self._pool.submit(self.generate, [request], **how) for request in requests]
        return Later(self._at_work, self._loses[1] if self._begun == self._loses[0] else None)

    def close(self) -> None:
        self._pool.shutdown()


class Made:
    """A run in memory. weights: of the student after every step, the first ones before any."""

    def __init__(
        self, tmp_path: Path, ahead: int, slow_s: float = 0.0, *, batch: int = 2, parts: int = 1, **engine
    ) -> None:
        """slow_s: what the student's updates take longer, and what D's passes do for two prompts."""
        config = Config.model_validate(
            {
                "data": {"max_prompt_tokens": 64, "max_response_tokens": 6},
                "rollout": {"engine": "hf", "group_size": 3, "ahead": ahead, "parts": parts},
                "schedule": {
                    "batch_size": batch,
                    "gad_epochs": 9,
                    "gad_steps": STEPS,
                    "activation_checkpointing": "off",
                },
                "algorithm": {"importance_cap": 2.0},
                "checkpoint": {"every": 0},
            }
        )
        spec = ModelSpec.resolve(str(save_tiny(tmp_path)))
        self.student = Student.load(spec, config.student, config.algorithm, device="cpu")
        self.engine = Elsewhere(config, self.student.model, spec.template, **engine)
        self.records, self.phases = Rows(), Phases()
        self.discriminator = Discriminator.load(spec, student=spec, device="cpu")
        sampling = {"temperature": 0.8, "max_tokens": 6, "states": self.phases, "waiting": self.phases.without_state}
        self.trainer = Trainer(
            config,
            stages_of(config, "train"),
            student=self.student,
            discriminator=self.discriminator,
            sampler=Sampler(self.engine, PlainWeights(self.student.model), **sampling),
            loader=Loader([Group(g.prompt, g.teacher) for g in groups(4)], batch, seed=0),
            held_out=groups(3, 0),
            records=self.records,
            phases=self.phases,
        )
        self.phases.memory = self.trainer.memory
        step = self.student.step

        def watched(lr):
            time.sleep(slow_s)
            norm = step(lr)
            self.weights.append(fingerprint(self.student.model.named_parameters()))
            return norm

        self.student.step = watched  # type: ignore[method-assign]
        fitted = self.discriminator._fitted

        def slowly(groups):
            time.sleep(slow_s / 2 * len(groups) if parts > 1 else 0)
            return fitted(groups)

        self.discriminator._fitted = slowly  # type: ignore[method-assign]
        self.weights = [fingerprint(self.student.model.named_parameters())]

    def gad(self) -> tuple[float, float]:
        """Seconds: of the stage; of drawing that the trainer did not wait for."""
        begin = time.perf_counter()
        STAGES["gad"](self.trainer)
        taken = time.perf_counter() - begin
        self.trainer.end_stage("gad")
        self.engine.close()
        return taken, self.engine.worked_s - self.phases.seconds["rollout"]

    def drew(self, step: int) -> int:
        """Which of `weights` the samples of a step are of."""
        order = self.trainer.loader.batch((step - 1) // 2, (step - 1) % 2)
        seeds = [request.seed for request in self.trainer.sampler.requests(order, 3, f"gad/{step}")]
        (found,) = {self.engine.drawn[seed] for seed in seeds}
        return self.weights.index(found)


def test_samples_are_of_the_weights_before_the_last_update(tmp_path) -> None:
    made = Made(tmp_path, 1)
    made.gad()
    assert [made.drew(step) for step in range(1, STEPS + 1)] == [0, 0, 1, 2]
    assert [row["sampler/staleness"] for row in made.records.rows] == [0, 1, 1, 1]
    # Each is held against the log-probs that it was drawn with.
    differences = [row["sampler/logprob_diff_mean"] for row in made.records.rows]
    assert differences[0] < 1e-5 < min(differences[1:])
    now = Made(tmp_path, 0)
    now.gad()
    assert [now.drew(step) for step in range(1, STEPS + 1)] == [0, 1, 2, 3]
    assert not any("sampler/staleness" in row for row in now.records.rows)


def test_a_step_takes_the_longer_of_both_and_not_their_sum(tmp_path) -> None:
    """The sampler takes SLOW_S a batch, and so does the trainer."""
    turns, beside = (Made(tmp_path, 1, SLOW_S, beside=beside) for beside in (False, True))
    (in_turn, hidden), (overlapped, meanwhile) = turns.gad(), beside.gad()
    print(f"{in_turn:.2f} s by turns, {overlapped:.2f} s side by side")
    # Both are sums of times: on a busy machine they are off by a share of them.
    assert in_turn > 2 * STEPS * SLOW_S and hidden == pytest.approx(0, abs=max(0.1, 0.02 * in_turn))
    # All but the first batch are drawn while the trainer is at work: of each the shorter time is gained.
    assert meanwhile > 0.9 * (STEPS - 1) * SLOW_S
    # The same batches, whenever they come.
    assert [turns.drew(step) for step in range(1, STEPS + 1)] == [0, 0, 1, 2]
    ours, theirs = ([row["reward/mean"] for row in made.records.rows] for made in (beside, turns))
    assert ours == theirs


def test_what_is_drawn_meanwhile_waits_and_what_is_lost_is_drawn_anew(tmp_path) -> None:
    made = Made(tmp_path, 1, loses=(2, 0))
    look = made.trainer.record

    def looked(result):
        look(result)
        made.trainer.heldout.evaluate()

    made.trainer.record = looked  # type: ignore[method-assign]
    made.gad()
    assert [made.drew(step) for step in range(1, STEPS + 1)] == [0, 0, 2, 2]
    assert [row["sampler/staleness"] for row in made.records.rows] == [0, 1, 0, 1]
    assert made.records.messages == [
        "the sampler was restarted: its batch is drawn anew, by the weights as they are now (sampler/staleness 0)"
    ]


def test_the_discriminator_scores_parts_while_others_are_drawn(tmp_path) -> None:
    whole, parted = (Made(tmp_path, 0, SLOW_S, batch=4, parts=parts) for parts in (1, 4))
    (one_by_one, hidden), (overlapped, meanwhile) = whole.gad(), parted.gad()
    print(f"{one_by_one:.2f} s one after the other, {overlapped:.2f} s part by part")
    # Drawn while D scores, of every batch of four: all but the first part, of which D waits for each.
    assert hidden == pytest.approx(0, abs=0.1) and meanwhile > 0.9 * STEPS * 3 * SLOW_S / 2
    for ours, theirs in zip(parted.records.rows, whole.records.rows, strict=True):
        for name in ("reward/mean", "discriminator/loss", "discriminator/grad_norm", "student/loss", "tokens/sampled"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), name
    again = Made(tmp_path, 0, batch=4, parts=4)
    again.gad()
    assert again.weights == parted.weights, "parts come in one order, whatever is there first"


def test_parts_that_are_lost_are_drawn_again(tmp_path) -> None:
    whole, lost = (Made(tmp_path, 0, batch=4, parts=4, loses=loses) for loses in ((0, 0), (2, 2)))
    whole.gad()
    lost.gad()
    assert lost.weights == whole.weights and len(whole.weights) == STEPS + 1
    assert lost.records.messages == ["the sampler was restarted: the rest of its batch is drawn again"]


def test_what_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="only importance weights set right: set algorithm.importance_cap"):
        load(["--rollout.ahead", "1"])
    with pytest.raises(UserError, match="rollout.ahead"):
        load(["--rollout.ahead", "2"])
    ahead = ["--rollout.ahead", "1", "--algorithm.importance_cap", "2", "--run.device", "cpu"]
    for engine in ("vllm", "hf"):
        with pytest.raises(UserError, match=f'rollout.engine = "{engine}" has the trainer\'s devices here'):
            check_elsewhere(load([*ahead, "--rollout.engine", engine]))
        check_elsewhere(load([*ahead, "--rollout.engine", engine, "--rollout.ahead_by_turns", "true"]))
    whole = ["--student.adapter", "none"]
    check_elsewhere(load([*ahead, *whole, "--rollout.engine", "vllm-server"]))
    with pytest.raises(
        UserError, match='rollout.parts = 4 samples while the trainer computes, and rollout.engine = "hf"'
    ):
        check_elsewhere(load(["--rollout.engine", "hf", "--rollout.parts", "4", "--run.device", "cpu"]))
    with pytest.raises(UserError, match="leave one of them out"):
        load([*ahead, "--rollout.parts", "4"])


def test_which_servers_have_devices_of_their_own() -> None:
    from gadcore.rollout.server import ServerEngine

    def elsewhere(device: str, **rollout) -> bool:
        config = Config.model_validate({"rollout": {"engine": "vllm-server", **rollout}})
        return ServerEngine.samples_elsewhere(config, device)

    url = "http://10.0.0.2:8000"
    assert elsewhere("cpu") and elsewhere("cuda", url=url) and elsewhere("cuda", url=url, transfer="nccl")
    assert not elsewhere("cuda") and not elsewhere("cuda", url=url, transfer="ipc")


class Killed(BaseException):
    """In place of a kill: nothing handles it."""


def test_a_run_that_was_killed_goes_on_to_the_bit(module_folder, monkeypatch) -> None:
    """With the batch that was on its way as the checkpoint was written."""
    arguments = [
        *tiny_arguments(module_folder), "--tracking.monitor_interval", "0", "--rollout.ahead", "1",
        "--rollout.ahead_by_turns", "true", "--algorithm.importance_cap", "2", "--data.eval", "none",
        "--schedule.warmup_steps", "2", "--schedule.gad_steps", "3",
    ]  # fmt: skip
    assert main([*arguments, "--run.dir", str(module_folder / "whole")]) == 0
    original, calls = store.save_file, []

    def killing(*args, **kwargs):
        calls.append(args)
        # Steps 2 and 4 have a checkpoint, of five files and of seven: this is in that of step 5.
        if len(calls) == 14:
            raise Killed
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(store, "save_file", killing)
        with pytest.raises(Killed):
            main([*arguments, "--run.dir", str(module_folder / "killed")])
    kept = module_folder / "killed/checkpoints/step-000004"
    assert store.latest(kept.parent) == kept
    state = json.loads((kept / "state.json").read_text())["ahead"]
    assert state["purpose"] == "gad/3" and len(load_file(kept / "ahead.safetensors")["lengths"]) == 12
    assert main(["--run.dir", str(module_folder / "killed"), "--resume", "auto"]) == 0
    ours, theirs = (records(module_folder / name) for name in ("killed", "whole"))
    assert ours == theirs
    assert [row["sampler/staleness"] for row in ours] == [0, 1, 0, 1, 1]
    ours, theirs = ((module_folder / name / "student/model.safetensors").read_bytes() for name in ("killed", "whole"))
    assert ours == theirs
