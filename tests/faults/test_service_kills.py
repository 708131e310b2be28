"""The discriminator service under several clients while server and clients are killed at random moments.

What is counted is what the clients have written down, not what the service says of itself: the updates of their logs,
made again one by one by the library alone, must give every score that any of them was answered, and in the end the very
weights and moments of the service.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from gadcore import Discriminator, DiscriminatorSettings
from gadcore.checkpoint import store
from gadcore.distributed.world import World
from gadcore.integrations.service.journal import Journal
from tests.support import service_client
from tests.support.ranks import run_ranks
from tests.support.runs import ROOT
from tests.support.service import ServiceProcess, settings

pytest.importorskip("fastapi")

HERE = "tests.faults.test_service_kills"


class Clients:
    """Processes that ask, each with a log of its own."""

    def __init__(self, url: str, folder: Path, names: list[str], each: int, most: int) -> None:
        self.folder, self.names, self.kills = folder, names, 0
        folder.mkdir()
        script = ROOT / "tests/support/service_client.py"
        command = [sys.executable, str(script), url, str(folder)]
        self._commands = {name: [*command, name, str(each), str(most)] for name in names}
        self._processes = {name: self._started(name) for name in names}

    def _started(self, name: str) -> subprocess.Popen:
        return subprocess.Popen(self._commands[name], env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT)

    def running(self) -> list[str]:
        found = []
        for name, process in self._processes.items():
            code = process.poll()
            assert code in (None, 0), f"client {name} ended with {code}"
            found += [name] if code is None else []
        return found

    def kill(self, name: str) -> None:
        self._processes[name].kill()
        self._processes[name].wait()
        self._processes[name] = self._started(name)
        self.kills += 1

    def answered(self) -> int:
        return sum(path.read_bytes().count(b'"answered"') for path in self.folder.glob("*.jsonl"))

    def lines(self) -> list[dict[str, Any]]:
        return [line for name in self.names for line in service_client.read_log(self.folder / f"{name}.jsonl")]


def rss(process: subprocess.Popen) -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def under_fire(
    folder: Path, requests: int, clients: int, most: int, kills: int, calm: float, **changed: Any
) -> dict[str, Any]:
    """Lets `clients` ask for `requests` updates of at most `most` groups. Server and a client are killed `kills` times,
    before the last `calm` share of them. Checks everything; returns figures."""
    rng, begin = random.Random(0), time.monotonic()
    service = ServiceProcess(folder, settings(folder, **changed))
    service.start()
    service.wait_until_ready()
    asking = Clients(service.url, folder / "logs", [f"c{k}" for k in range(clients)], requests // clients, most)
    moments = sorted(rng.uniform(0.02, 1 - calm) * requests for _ in range(kills))
    sizes: list[tuple[int, int]] = []
    try:
        while running := asking.running():
            answered = asking.answered()
            if moments and answered >= moments[0]:
                moments.pop(0)
                time.sleep(rng.uniform(0, 0.1))
                service.end(signal.SIGTERM if rng.random() < 0.2 else signal.SIGKILL)
                service.start()
                asking.kill(rng.choice(running))
            assert service.process is not None and service.process.poll() is None, service.said()
            if not moments:
                sizes.append((answered, rss(service.process)))
            time.sleep(0.2)
    finally:
        service.end()
    seconds = time.monotonic() - begin
    made = check(folder, asking.lines(), requests, most)
    return made | {"seconds": seconds, "starts": service.starts, "client kills": asking.kills, "rss": sizes}


def check(folder: Path, lines: list[dict[str, Any]], requests: int, most: int) -> dict[str, Any]:
    answers: dict[str, dict[str, Any]] = {}
    for line in lines:
        if line["what"] != "sent":
            found = {key: line[key] for key in ("version", "scored_by", "scores")}
            assert answers.setdefault(line["id"], found) == found, "another answer to the same request"
    assert len(answers) == requests
    by_version = defaultdict(list)
    for request_id, answer in answers.items():
        assert answer["scored_by"] == answer["version"] - 1
        by_version[answer["version"]].append(request_id)
    assert sorted(by_version) == list(range(1, len(by_version) + 1)), "a version that nobody has seen, or seen twice"
    journal = Journal(folder / "service/journal.sqlite")
    order = dict(journal._reader.execute("SELECT id, place FROM requests"))
    journal.close()
    updates = [sorted(by_version[version], key=order.__getitem__) for version in sorted(by_version)]
    # In a process of its own, as the service: vLLM in this one, from an earlier test, would change the last bits.
    ((again_scores, expected),) = run_ranks(1, f"{HERE}:again", folder / "model", updates, most, deadline=1800)
    for version, (ids, rows) in enumerate(zip(updates, again_scores, strict=True), 1):
        assert rows == [row for request_id in ids for row in answers[request_id]["scores"]], f"version {version}"
    newest = store.latest(folder / "service/checkpoints")
    assert newest is not None and newest.name == f"step-{len(by_version):06d}"
    saved = load_file(newest / "discriminator.safetensors")
    assert {f"parameters.{name}": tensor.tolist() for name, tensor in saved.items()} == expected
    known = sum(bool(line.get("again")) for line in lines)
    sent = sum(line["what"] == "sent" for line in lines)
    return {"updates": len(by_version), "sent": sent, "got an answer that was there": known}


def again(_: World, model: Path, updates: list[list[str]], most: int) -> tuple[list[list[list[float]]], dict[str, Any]]:
    """Scores of each update, the teacher's first, and the weights after the last."""
    d = Discriminator.load(str(model), DiscriminatorSettings(lr=1e-4), device="cpu", seed=3)
    made = []
    for ids in updates:
        texts = [group for request_id in ids for group in service_client.groups_of(request_id, most)]
        scores = d.update([d.group(g.prompt, g.teacher_response, g.samples, g.finished) for g in texts])
        made.append([[t, *own] for t, own in zip(scores.teacher_scores, scores.rewards, strict=True)])
    weights = {name: tensor.tolist() for name, tensor in d.state_dict().items() if name.startswith("parameters.")}
    return made, weights


def test_every_group_is_trained_once_whatever_is_killed(tmp_path: Path) -> None:
    found = under_fire(tmp_path, 300, 4, 3, kills=2, calm=0.2, service__checkpoint_every=20)
    assert found["starts"] == 3 and found["client kills"] == 2 and found["sent"] > 300


@pytest.mark.by_hand
@pytest.mark.timeout(5400)
def test_twenty_thousand_requests_of_eight_clients(tmp_path: Path) -> None:
    """The first 8,000 under fire, the rest of them to see that the process that was started last stays as large."""
    found = under_fire(
        tmp_path, 20_000, 8, 1, kills=10, calm=0.6, service__checkpoint_every=50, service__batch_groups=8,
        service__batch_seconds=0.05,
    )  # fmt: skip
    sizes = found.pop("rss")
    shown = {f"{size / 2**20:.0f} MiB": answered for answered, size in sizes[:: max(1, len(sizes) // 12)]}
    print(found, "resident after so many requests:", shown)
    # It grows until it has seen every kind of batch; where clients end, batches are of another kind again.
    late = [size for answered, size in sizes if 15_000 <= answered < 19_500]
    assert sum(late[-10:]) / 10 < sum(late[:10]) / 10 + 16 * 2**20
