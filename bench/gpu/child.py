"""One stage in a process of its own: a device that an error has left unusable, or memory that a library keeps, is not
the next stage's. Rows go to a file descriptor, a line each, as soon as they are there."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence

from bench import record
from bench.gpu.place import Place, Row, failed
from bench.gpu.stages import STAGES
from gadcore.config.device import quiet
from gadcore.errors import cause


def in_child(stage: str, flags: Sequence[str], limit_s: float) -> Iterator[Row]:
    """Rows of a stage, the last one with the reason where its process ended badly, or was ended after limit_s."""
    reading, writing = os.pipe()
    command = [sys.executable, "-m", "bench.gpu.child", stage, "--to", str(writing), *flags]
    process = subprocess.Popen(command, cwd=record.ROOT, pass_fds=(writing,))
    os.close(writing)
    late = threading.Event()

    def end() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(limit_s, end)
    timer.start()
    try:
        with os.fdopen(reading) as lines:
            for line in lines:
                yield json.loads(line)
        code = process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:
            process.kill()
            process.wait()
    if late.is_set():
        yield failed("all", f"ended after {limit_s:.0f} s")
    elif code:
        ending = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        yield failed("all", f"the stage's process ended with {ending}")


def here(stage: str, place: Place) -> Iterator[Row]:
    """Rows of a stage in this process; the last one with the error where it broke off."""
    quiet()
    try:
        for row in STAGES[stage].function()(place):
            yield row | {"machine": place.facts}
    except Exception as error:
        traceback.print_exc()
        yield failed("all", cause(error)) | {"machine": place.facts}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--to", type=int, required=True)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    os.set_inheritable(options.to, False)
    with os.fdopen(options.to, "w", buffering=1) as out:
        for row in here(options.stage, Place.find(rehearse=options.rehearse, quick=options.quick)):
            out.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
