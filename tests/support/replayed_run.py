"""gadcore.run with samples of a file: python replayed_run.py record|replay FILE [fault ..] -- ARGUMENTS.

record: writes down what the engine samples, by its seeds. replay: gives the same samples, so that runs of other numbers
of processes train on the same. A fault is RANK:MOMENT:COUNT:HOW, in the process of that rank alone: at the count-th
rollout, update (of the discriminator) or checkpoint (file that is written) it is killed, hangs, or gets a signal.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from gadcore.checkpoint import shards, store
from gadcore.data.groups import Response
from gadcore.models.discriminator import Discriminator
from gadcore.rollout.sampler import Sampler
from gadcore.run import program


def install(mode: str, file: Path) -> None:
    original = Sampler.generate
    kept: dict[str, list] = json.loads(file.read_text()) if file.exists() else {}

    def recorded(self, requests, done=None):
        drawn = original(self, requests, done)
        for request, responses in zip(requests, drawn, strict=True):
            kept[str(request.seed)] = [[r.text, r.token_ids, r.finished, r.logprobs] for r in responses]
        file.write_text(json.dumps(kept))
        return drawn

    def replayed(self, requests, done=None):
        with self._states("synchronise"):
            self.engine.wake("weights")
            self.engine.update_weights(self.weights)
        with self._states("rollout"):
            self.engine.wake("kv_cache")
            return [
                [Response(text, tuple(ids), finished, tuple(p)) for text, ids, finished, p in kept[str(request.seed)]]
                for request in requests
            ]

    Sampler.generate = recorded if mode == "record" else replayed


def fail_at(rank: str, moment: str, count: str, how: str) -> None:
    """Only in the first attempt of a job."""
    if os.environ.get("RANK", "0") != rank or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return
    places = {
        "rollout": [(Sampler, "generate")],
        "update": [(Discriminator, "step")],
        "checkpoint": [(store, "save_file"), (shards, "save_file")],
    }
    calls = {"count": 0}

    def wrap(owner, name):
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            calls["count"] += 1
            if calls["count"] == int(count):
                print(f"fault at {time.time():.2f}", file=sys.stderr, flush=True)
                if how == "hang":
                    time.sleep(3600)
                os.kill(os.getpid(), getattr(signal, how))
            return original(*args, **kwargs)

        setattr(owner, name, wrapped)

    for owner, name in places[moment]:
        wrap(owner, name)


if __name__ == "__main__":
    end = sys.argv.index("--")
    install(sys.argv[1], Path(sys.argv[2]))
    for fault in sys.argv[3:end]:
        fail_at(*fault.split(":"))
    sys.argv[1:] = sys.argv[end + 1 :]
    program()
