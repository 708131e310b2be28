"""A job of steps that are one sum each, in which a process fails in a chosen way: python failing_job.py HOW TIMEOUT."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback

import torch

from gadcore.config.distributed import DistributedSettings
from gadcore.config.process import StopSignals, leave
from gadcore.config.settings import Config
from gadcore.errors import Interrupted, UserError
from gadcore.run import _sentence
from gadcore.train.job import Job, join_job

STEPS, AT = 15, 4


def work(job: Job, how: str) -> int:
    at = {"step": 0}
    job.follows(lambda: ("rollout" if at["step"] % 2 else "student", at["step"]))
    stop = job.agreed_stop()
    job.signals.finish_steps()
    for step in range(STEPS):
        at["step"] = step
        if (reason := stop()) is not None:
            raise Interrupted(f"stopped by {reason} after step {step}")
        if step == AT and job.world.rank == 1:
            fail(how)
        if step == AT and how == "all":
            raise UserError("nobody can read it: give another one")
        job.world.sum_(torch.ones(1))
        time.sleep(0.2)
    print("done", flush=True)
    return 0


def fail(how: str) -> None:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hang":
        time.sleep(600)
    if how == "raise":
        raise ZeroDivisionError("a mistake of the program")
    if how == "told":
        raise UserError("the disk is full: make room")
    if how == "SIGTERM":
        os.kill(os.getpid(), signal.SIGTERM)


def main(how: str, timeout_s: float) -> int:
    signals = StopSignals()
    config = Config(distributed=DistributedSettings(timeout_s=timeout_s))
    try:
        return join_job(config, signals, lambda job: work(job, how), lambda error: _sentence(error, "train", signals))
    finally:
        print(f"left {time.monotonic():.1f}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        code = main(sys.argv[1], float(sys.argv[2]))
    except ZeroDivisionError:
        traceback.print_exc()
        code = 1
    leave(code)
