"""Two nodes that are network namespaces of this machine, with a slow link between them. By hand, as root."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest

from tests.runs.test_distributed import SCRIPT, arguments, assert_alike
from tests.support.runs import ROOT, run

pytestmark = [
    pytest.mark.by_hand,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        not (hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("tc")), reason="needs root, ip and tc"
    ),
]
# The link is slow from the second run on.
RUNS = {"fast-shard-2": (), "slow-shard-2": (), "slow-replicate-2": ("--distributed.replicate", "2")}
LINK = ("rate", "20mbit", "burst", "32kb", "latency", "200ms")
NODES, INTERFACES, ADDRESSES = ("gad-a", "gad-b"), ("gad-va", "gad-vb"), ("10.77.0.1", "10.77.0.2")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def inside(node: int, *words: str) -> list[str]:
    return ["ip", "netns", "exec", NODES[node], *words]


@pytest.fixture
def nodes() -> Iterator[None]:
    for name in NODES:
        ip("netns", "add", name)
    try:
        ip("link", "add", INTERFACES[0], "type", "veth", "peer", "name", INTERFACES[1])
        for i in range(2):
            ip("link", "set", INTERFACES[i], "netns", NODES[i])
            for words in (
                ("ip", "addr", "add", f"{ADDRESSES[i]}/24", "dev", INTERFACES[i]),
                ("ip", "link", "set", INTERFACES[i], "up"),
                ("ip", "link", "set", "lo", "up"),
            ):
                subprocess.run(inside(i, *words), check=True)
        yield
    finally:
        for name in NODES:
            subprocess.run(["ip", "netns", "del", name])


def sent(node: int) -> int:
    """Bytes that a node has sent."""
    path = f"/sys/class/net/{INTERFACES[node]}/statistics/tx_bytes"
    return int(subprocess.run(inside(node, "cat", path), check=True, capture_output=True, text=True).stdout)


def trained(folder: Path, name: str, *others: str) -> tuple[list[int], dict[str, float]]:
    """(bytes that each node has sent, seconds of a GAD step by phase) of a run of one process on each node."""
    before, started = [sent(i) for i in range(2)], []
    for i in range(2):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": INTERFACES[i]}
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(i), "--nproc-per-node",
            "1", "--master-addr", ADDRESSES[0], "--master-port", "29511",
            SCRIPT, "replay", str(folder / "samples.json"), "--", *arguments(folder, "--run.dir", name, *others),
        ]  # fmt: skip
        output = (folder / f"{name}-{i}").open("wb")
        started.append(subprocess.Popen(inside(i, *command), cwd=folder, env=env, stdout=output, stderr=output))
    codes = [process.wait(timeout=900) for process in started]
    assert codes == [0, 0], [(folder / f"{name}-{i}").read_text()[-3000:] for i in range(2)]
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    gad = [row for row in rows if row["stage"] == "gad"]
    phases = {key for row in gad for key in row if key.startswith("time/")}
    return [sent(i) - before[i] for i in range(2)], {key: median(row.get(key, 0.0) for row in gad) for key in phases}


def test_a_run_over_a_slow_link(nodes, tmp_path) -> None:
    command = [sys.executable, SCRIPT, "record", str(tmp_path / "samples.json"), "--"]
    done = run(arguments(tmp_path, "--run.dir", "one"), tmp_path, command=command)
    assert done.returncode == 0, done.stderr
    found = {}
    for place, settings in RUNS.items():
        if place == "slow-shard-2":
            for i in range(2):
                words = ("tc", "qdisc", "add", "dev", INTERFACES[i], "root", "tbf", *LINK)
                subprocess.run(inside(i, *words), check=True)
        found[place] = trained(tmp_path, place, *settings)
        assert_alike(tmp_path / place, tmp_path / "one", rel=1e-5)
        facts = json.loads((tmp_path / place / "summary.json").read_text())["distributed"]
        assert facts["nodes"] == 2 and facts["processes"] == 2
    for place, (moved, phases) in found.items():
        seconds = ", ".join(f"{key.removeprefix('time/')} {value:.3f}" for key, value in sorted(phases.items()))
        print(f"\n{place}: sent by node {moved[0] / 1e6:.1f} and {moved[1] / 1e6:.1f} MB; a GAD step: {seconds} s")
    # Whole copies exchange no weights.
    assert sum(found["slow-replicate-2"][0]) < sum(found["slow-shard-2"][0])
    assert found["slow-shard-2"][1]["time/total"] > found["fast-shard-2"][1]["time/total"]
