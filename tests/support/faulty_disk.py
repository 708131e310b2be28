"""A run that is killed, or whose disk is full, at a chosen call that changes its folder, and then goes on.

Runs are children of one process that has imported everything, so that one takes a second or two. As a program:

    python -m tests.support.faulty_disk FOLDER kill|half|full:FIRST:STRIDE ..

does so at every STRIDE-th call from FIRST on, and prints a JSON line for every one that ended otherwise than the run
that nobody disturbed, and at the end one that counts. FOLDER takes a model, rows, and the runs. kill: before the call;
half: where a write has written half; full: from this call on nothing that needs space can be done.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")
ACTIONS = {"count": 0, "kill": 1, "half": 2, "full": 3}
# Both stages, and two checkpoints in the second: on top of tiny_arguments().
SHORT = ["--schedule.warmup_steps=1", "--schedule.gad_steps=2", "--checkpoint.every=2", "--data.eval_rows=2"]
ROOT = Path(__file__).resolve().parents[2]


def compiler() -> str | None:
    return shutil.which("cc")


def build(folder: Path) -> Path:
    """The library to preload."""
    library = folder / "faulty_disk.so"
    subprocess.run([compiler() or "cc", "-O1", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=True)
    return library


def start(folder: Path, plans: Sequence[str]) -> list[dict]:
    """What the program of this module printed, as rows; `folder` is made."""
    folder.mkdir(parents=True, exist_ok=True)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "LD_PRELOAD": str(build(folder))}
    command = [sys.executable, "-m", "tests.support.faulty_disk", str(folder), *plans]
    done = subprocess.run(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0
    return [json.loads(line) for line in done.stdout.splitlines()]


def in_child(what: Callable[[], int], log: Path) -> int:
    """The exit status of a child that does it: as of os.waitstatus_to_exitcode(). Its output goes to the log."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 70
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            status = what()
            sys.stdout.flush()
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(status)


class Disturbed:
    """Runs in `folder`, with the arguments of a new run but its folder."""

    def __init__(self, folder: Path, arguments: list[str]) -> None:
        self.folder, self.arguments = folder, arguments
        self.library = ctypes.CDLL(None)
        self.library.fault_count.restype = ctypes.c_long
        self.library.fault_arm.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_long]
        # Outside the run's folder: what is counted must not depend on it.
        self.counted = folder / "counted"

    def run(self, arguments: list[str], name: str, action: str = "count", moment: int = 0) -> int:
        from gadcore.run import main

        def work() -> int:
            os.chdir(self.folder)
            self.library.fault_arm(str(self.folder / name).encode(), ACTIONS[action], moment)
            status = main(arguments)
            calls = self.library.fault_count()
            self.library.fault_arm(b"", 0, 0)
            self.counted.write_text(str(calls))
            return status

        return in_child(work, self.folder / f"{name}.log")

    def whole(self) -> int:
        """The run that nobody disturbs, in whole/; returns how many calls change its folder."""
        status = self.run([*self.arguments, "--run.dir", "whole"], "whole")
        if status:
            raise RuntimeError((self.folder / "whole.log").read_text())
        return int(self.counted.read_text())

    def wrong(self, action: str, moment: int) -> str | None:
        """What differs after a run was disturbed at a call and went on as its user would; None: nothing."""
        from gadcore.files import LOCK
        from tests.support.runs import assert_same_run

        shutil.rmtree(self.folder / "run", ignore_errors=True)
        begin = [*self.arguments, "--run.dir", "run"]
        status = self.run(begin, "run", action, moment)
        expected = {2, 0} if action == "full" else {-signal.SIGKILL, 0}
        if status not in expected:
            return f"ended with {status}: {self._log()}"
        # A run exists from its config.toml on; before that there is nothing to go on with, and nothing in the way.
        there = (self.folder / "run/config.toml").exists()
        if not there and action == "full" and (self.folder / "run").exists():
            return f"a failed start left {os.listdir(self.folder / 'run')}"
        status = self.run(["--run.dir", "run", "--resume", "auto"] if there else begin, "run")
        if status:
            return f"went on with {status}: {self._log()}"
        try:
            assert_same_run(self.folder / "run", self.folder / "whole")
            names = [{path.name for path in (self.folder / name).iterdir()} for name in ("run", "whole")]
            # The lock file of a dead process may stay: it holds nothing.
            different = (names[0] ^ names[1]) - {LOCK}
            assert not different, different
        except (AssertionError, OSError) as error:
            return f"another result: {str(error)[:500]}"
        return None

    def _log(self) -> str:
        return (self.folder / "run.log").read_text()[-1500:]


def program(arguments: list[str]) -> None:
    folder, plans = Path(arguments[0]).resolve(), [plan.split(":") for plan in arguments[1:]]
    from tests.support.runs import tiny_arguments

    # Imported once, by the parent of all runs.
    with contextlib.redirect_stdout(io.StringIO()):
        import gadcore.algorithm
        import gadcore.plan.command
        import gadcore.report.page
        import gadcore.rollout.hf
        import gadcore.train.build  # noqa: F401
    disturbed = Disturbed(folder, [*tiny_arguments(folder), *SHORT])
    calls, tried = disturbed.whole(), 0
    for action, first, stride in plans:
        for moment in range(int(first), calls + 1, int(stride)):
            tried += 1
            if wrong := disturbed.wrong(action, moment):
                print(json.dumps({"action": action, "call": moment, "wrong": wrong}), flush=True)
    print(json.dumps({"calls": calls, "tried": tried}))


if __name__ == "__main__":
    program(sys.argv[1:])
