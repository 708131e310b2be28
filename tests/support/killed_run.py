"""gadcore.run with a SIGKILL at a chosen moment: python killed_run.py MOMENT COUNT -- ARGUMENTS."""

from __future__ import annotations

import os
import signal
import sys

from gadcore.checkpoint import store
from gadcore.models.discriminator import Discriminator
from gadcore.rollout.sampler import Sampler
from gadcore.run import main


def kill_at(owner, name: str, count: int, *, after: bool) -> None:
    """Kills the process at the count-th call of owner.name, before or after it does its work."""
    original = getattr(owner, name)
    calls = 0

    def wrapped(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == count and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, wrapped)


def install(moment: str, count: int) -> None:
    if moment == "rollout":
        # The engine is at work when the signal comes: it is killed out of a thread.
        import threading

        original = Sampler.draw
        calls = 0

        def generate(self, *args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == count:
                threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
                while True:
                    original(self, *args, **kwargs)
            return original(self, *args, **kwargs)

        Sampler.draw = generate
    elif moment == "update":
        # The student has taken its step, the discriminator has not.
        kill_at(Discriminator, "step", count, after=False)
    elif moment == "checkpoint":
        # Some files of the checkpoint are written, others are not.
        kill_at(store, "save_file", count, after=True)
    else:
        raise ValueError(moment)


if __name__ == "__main__":
    install(sys.argv[1], int(sys.argv[2]))
    sys.exit(main(sys.argv[4:]))
