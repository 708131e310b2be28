"""vLLM's own server, killed, restarted, asked without its token, and fed by two ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

from gadcore.config.settings import Config
from gadcore.distributed.world import World
from gadcore.errors import UserError
from gadcore.models.loading import load_causal_lm
from gadcore.rollout.engine import make_engine
from gadcore.rollout.hf import HFEngine
from gadcore.rollout.probe import Probe
from gadcore.rollout.sampler import Sampler
from gadcore.rollout.server_memory import MemoryTrainer
from gadcore.rollout.server_process import ServerProcess, arguments, environment
from gadcore.rollout.weights import PlainWeights
from tests.engine.test_engine_over_ranks import Trainer, error_of, requests, tokens
from tests.support.builders import TEMPLATE
from tests.support.ranks import run_ranks
from tests.support.runs import ROOT, records, run, tiny_arguments
from tests.support.tiny import save_tiny

pytestmark = [pytest.mark.by_hand, pytest.mark.timeout(1800)]
HERE = "tests.engine.test_server"
TOKEN = "a-token-of-the-test"


def config_of(**rollout) -> Config:
    own = {"engine": "vllm-server", "group_size": 4, "max_num_seqs": 64, **rollout}
    return Config.model_validate(
        {
            "data": {"max_prompt_tokens": 64, "max_response_tokens": 24},
            "rollout": own,
            "algorithm": {"kl_coef": 0.0},
        }
    )


def serve(path: str, port: int | None = None) -> ServerProcess:
    config = config_of()
    command = arguments(config, path, device="cpu", backend="gadcore_memory")
    return ServerProcess(command, environment(config.rollout, TOKEN, "memory"), port)


class Served:
    def __init__(self, path: str) -> None:
        self.path, self.server, self.over = path, serve(path), threading.Event()
        self.model = load_causal_lm(path, "float32", torch.device("cpu"))
        self.config = config_of(url=self.server.url, wait_s=900)
        try:
            self.engine = make_engine(self.config, path, self.model, TEMPLATE)
        except BaseException:
            print(self.server.said())
            self.server.close()
            raise
        self.sampler = Sampler(self.engine, PlainWeights(self.model), temperature=0.8, max_tokens=24)
        self.reference = HFEngine(self.config, "", self.model, TEMPLATE)

    def step(self) -> None:
        with torch.no_grad():
            for p in self.model.parameters():
                p.add_(0.05 * torch.randn_like(p))

    def agrees(self) -> bool:
        """Whether the server's greedy text is Hugging Face's on the trainer's weights as they are now."""
        ours = self.engine.generate(requests(), temperature=0.0, max_tokens=24)
        return tokens(ours) == tokens(self.reference.generate(requests(), temperature=0.0, max_tokens=24))

    def kill(self) -> None:
        """As a machine does that loses power: without a word."""
        os.killpg(self.server.process.pid, signal.SIGKILL)
        self.server.process.wait()
        time.sleep(2)

    def restart_after(self, seconds: float, *, kill: bool = False) -> None:
        """Beside the test, by a thread that lives as long as the server."""

        def work() -> None:
            time.sleep(seconds)
            if kill:
                self.kill()
            self.server = serve(self.path, self.server.port)
            self.over.wait()

        threading.Thread(target=work, daemon=True).start()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    pytest.importorskip("vllm")
    os.environ["GADCORE_SERVER_TOKEN"] = TOKEN
    made = Served(str(save_tiny(tmp_path_factory.mktemp("model"), "qwen2")))
    yield made
    made.engine.close()
    made.server.close()
    made.over.set()


def test_updates_arrive(served) -> None:
    for _ in range(3):
        served.step()
        served.sampler.generate(requests(2))
        assert served.agrees()


def test_every_route_wants_the_token(served) -> None:
    for path in ("/v1/models", "/weight_info", "/collective_rpc", "/update_weights", "/inference/v1/generate"):
        with pytest.raises(urllib.error.HTTPError) as error:
            body = None if path in ("/v1/models", "/weight_info") else b"{}"
            urllib.request.urlopen(urllib.request.Request(served.server.url + path, data=body))
        assert error.value.code == 401
    with urllib.request.urlopen(served.server.url + "/version") as answer:
        assert json.load(answer)["version"].startswith("0.32")


def test_a_wrong_token_ends_in_a_sentence(served, monkeypatch) -> None:
    monkeypatch.setenv("GADCORE_SERVER_TOKEN", "wrong")
    with pytest.raises(UserError, match="does not take the token"):
        make_engine(served.config, served.path, served.model, TEMPLATE)


def test_a_context_that_is_too_short_ends_in_a_sentence(served) -> None:
    rollout = served.config.rollout.model_copy(update={"context_tokens": 200})
    with pytest.raises(UserError, match="holds 88 tokens of context, this run needs 200"):
        make_engine(served.config.model_copy(update={"rollout": rollout}), served.path, served.model, TEMPLATE)


def test_an_update_that_is_left_out_is_noticed(served, monkeypatch) -> None:
    def score(groups):
        trainer = Trainer.__new__(Trainer)
        trainer.model = trainer.whole = served.model
        return trainer.score(groups)

    probe = Probe(score, every=1, dtype="float32")
    sampler = Sampler(served.engine, PlainWeights(served.model), temperature=0.8, max_tokens=24, probe=probe)
    sampler.generate(requests())
    served.step()
    with monkeypatch.context() as patched:
        patched.setattr(MemoryTrainer, "send_weights", lambda sender: None)
        with pytest.raises(RuntimeError, match="the server's weights differ from the trainer's after an update"):
            sampler.generate(requests())
        patched.setattr(served.engine, "_compare", lambda pairs: None)
        # The server tells the version that it has: it is the one before.
        with pytest.raises(RuntimeError, match="was restarted while it sampled"):
            sampler.generate(requests())
        client = served.engine.client
        patched.setattr(
            MemoryTrainer,
            "send_weights",
            lambda sender: client.post("/update_weight_version", {"new_version": client.version}),
        )
        with pytest.raises(UserError, match="the probe of sync 2"):
            sampler.generate(requests())
    sampler.generate(requests())
    assert served.agrees()


def test_an_update_that_a_trainer_left_open_is_ended(served) -> None:
    served.engine.client.start_weight_update()
    served.step()
    served.sampler.generate(requests())
    assert served.agrees()


def test_a_server_that_was_killed_and_restarted_gets_the_weights_again(served) -> None:
    before = served.sampler.generate(requests())
    served.kill()
    # Nobody is there at first: the next draw waits.
    served.restart_after(3)
    assert tokens(served.sampler.generate(requests())) == tokens(before)
    assert served.agrees()


def test_a_server_that_is_killed_while_it_samples(served, monkeypatch) -> None:
    before = served.sampler.generate(requests())
    asked = served.engine.client.generate
    killed = []

    def killing(bodies, done):
        if not killed:
            killed.append(served.restart_after(0.05, kill=True))
            # More than it can do in that time.
            asked([body for _ in range(200) for body in bodies], lambda place, answer: None)
        asked(bodies, done)

    monkeypatch.setattr(served.engine.client, "generate", killing)
    assert tokens(served.sampler.generate(requests())) == tokens(before)
    assert killed and served.agrees()


def test_a_server_of_our_own_that_ends_ends_the_run(tmp_path: Path) -> None:
    path = str(save_tiny(tmp_path, "qwen2"))
    model = load_causal_lm(path, "float32", torch.device("cpu"))
    engine = make_engine(config_of(wait_s=900), path, model, TEMPLATE)
    os.kill(engine._process.process.pid, signal.SIGKILL)
    engine._process.process.wait()
    time.sleep(1)
    sampler = Sampler(engine, PlainWeights(model), temperature=0.8, max_tokens=24)
    with pytest.raises(UserError, match="the vLLM server ended with exit code -9; it said last"):
        sampler.generate(requests())
    engine.close()


def ahead(folder: Path, name: str, *others: str) -> list[str]:
    settings = {"schedule.batch_size": 8, "rollout.group_size": 8, "algorithm.importance_cap": 2, "rollout.wait_s": 900}
    chosen = [str(item) for key, value in settings.items() for item in (f"--{key}", value)]
    return [*tiny_arguments(folder, "vllm-server"), *chosen, "--data.eval", "none", "--run.dir", name, *others]


def test_a_run_samples_one_step_ahead_and_goes_on(tmp_path: Path) -> None:
    """Beside one that waits for every batch; stopped with a batch on its way."""
    for name, others in (("now", ()), ("parts", ("--rollout.parts", "4")), ("ahead", ("--rollout.ahead", "1"))):
        done = run(ahead(tmp_path, name, *others), tmp_path, timeout=1500)
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        waited = [row["time/rollout"] for row in rows]
        totals = [row["time/total"] for row in rows]
        print(f"\n{name}: seconds of the steps {totals}, of waiting for samples {waited}")
    for ours, theirs in zip(records(tmp_path / "parts"), records(tmp_path / "now"), strict=True):
        for key in ("reward/mean", "discriminator/loss", "tokens/sampled"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3), (ours["step"], key)
    command = [sys.executable, "-m", "gadcore.run", *ahead(tmp_path, "stopped", "--rollout.ahead", "1")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    stopped = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "stopped/metrics.jsonl"
    while stopped.poll() is None and (not metrics.exists() or metrics.read_text().count("\n") < 4):
        time.sleep(0.02)
    stopped.send_signal(signal.SIGTERM)
    _, said = stopped.communicate(timeout=300)
    assert stopped.returncode == 128 + signal.SIGTERM, said
    (kept,) = (tmp_path / "stopped/checkpoints").glob("*/ahead.safetensors")
    done = run(["--run.dir", "stopped", "--resume", "auto"], tmp_path, timeout=1500)
    assert done.returncode == 0, done.stderr
    # The same samples; the server batches as requests arrive, which changes the last bits of their log-probs.
    for ours, theirs in zip(records(tmp_path / "stopped"), records(tmp_path / "ahead"), strict=True):
        for key in ("tokens/sampled", "reward/mean", "discriminator/loss", "sampler/staleness"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), (ours["step"], key)
    assert [row["sampler/staleness"] for row in records(tmp_path / "ahead")] == [0, 1, 0, 1, 1, 1]


def over_ranks(world: World, path: str) -> dict:
    trainer = Trainer(path, world)
    engine = make_engine(config_of(wait_s=900), path, trainer.model, TEMPLATE, world=world)
    reference = HFEngine(config_of(), "", trainer.whole, TEMPLATE)
    sampler = Sampler(
        engine, PlainWeights(trainer.model), temperature=0.8, max_tokens=24,
        probe=Probe(trainer.score, every=1, dtype="float32"),
    )  # fmt: skip
    found: dict = {"greedy": [], "expected": [], "sampled": []}
    for _ in range(3):
        trainer.step()
        found["sampled"].append(tokens(sampler.generate(requests())))
        found["greedy"].append(tokens(engine.generate(requests(), temperature=0.0, max_tokens=24)))
        found["expected"].append(tokens(reference.generate(requests(), temperature=0.0, max_tokens=24)))
    engine._sender.send_weights = lambda: None
    trainer.step()
    found["skipped"] = error_of(sampler.generate, requests())
    engine.close()
    return found


def test_two_ranks_feed_a_server_with_their_shards(tmp_path: Path) -> None:
    one, other = run_ranks(2, f"{HERE}:over_ranks", str(save_tiny(tmp_path, "qwen2")), deadline=1200, timeout_s=900)
    assert one["greedy"] == one["expected"] == other["greedy"]
    assert one["sampled"] == other["sampled"]
    for found in (one, other):
        assert "the server's weights differ from the trainer's after an update" in found["skipped"]
