"""What a command sets for its whole process: the environment of torch, signals, and streams that may be closed."""

from __future__ import annotations

import errno
import os
import signal
import sys
from io import TextIOWrapper
from typing import Any, NoReturn, TextIO

# SIGHUP arrives where a terminal or an ssh connection goes away.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# By any of these torch's allocator on a GPU is configured.
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def set_environment(threads: int, device: str, *, batch_invariant: bool = False) -> None:
    """What must be set before torch is imported. threads: run.threads; 0 leaves what the environment says. device:
    run.device. batch_invariant: that of the engine.
    """
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    if batch_invariant:
        # vLLM sets them as it starts (enable_batch_invariant_mode()); by then the trainer's products have workspaces.
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"
        os.environ["CUBLASLT_WORKSPACE_SIZE"] = "1"
    # Spinning threads slow each other down on a machine that does anything else; a short spin bridges the gaps between
    # the many small regions of sampling. A longer one gains little on an idle machine and loses much on a busy one.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    # torch's tensors in large pages: a training step would feel fresh memory being taken page by page.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # oneDNN keeps a compiled product for each of many shapes. Those of ragged batches seldom come back, so on real text
    # a process would grow step by step. The layers of a pass share theirs, so a few are enough.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    if device != "cpu" and not any(os.environ.get(name) for name in ALLOCATOR):
        # On a GPU: memory that states and ragged batches free is joined again instead of lying about in pieces. vLLM
        # takes its own, which sleeps, without (CuMemAllocator.use_memory_pool).
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    # The same bits for the same input, wherever an array happens to lie: a resumed run repeats the one it goes on with.
    os.environ.setdefault("MKL_CBWR", "AUTO")
    # And whatever else is at work on a GPU: cuBLAS promises its bits for a workspace of its own and of one size alone.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Advice from below torch's Python side (vLLM's memory policy) would tear the view of the run.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def several_processes() -> bool:
    """Whether torchrun has started this process with others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def restarts() -> int:
    """How often torchrun has started this job anew."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


class StopSignals:
    """What SIGTERM, SIGHUP and Ctrl-C do to a run: they stop it at once until `finish_steps()`, and from then on they
    are remembered, so that the step at work is finished; a second Ctrl-C stops at once.

    Where SIGHUP is ignored as the process starts, as nohup has it, it stays ignored.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        # Of several processes the name of this one.
        self.speaks_for: str | None = None
        self._finishes_steps = False
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._receive)

    def finish_steps(self) -> None:
        """There is a step to finish from here on."""
        self._finishes_steps = True

    def reason(self) -> str | None:
        """The name of the signal that came; None without one."""
        return None if self.received is None else signal.Signals(self.received).name

    def _receive(self, number: int, frame: object) -> None:
        self.received = number
        if not self._finishes_steps:
            raise KeyboardInterrupt
        if self.speaks_for is not None:
            # How long there is for it is torchrun's to say (--shutdown-timeout), which passes signals on.
            print(f"gadcore: {self.speaks_for}: finishing the step, then saving", file=sys.stderr)
            return
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        print("gadcore: finishing the step, then saving; Ctrl-C again stops at once", file=sys.stderr)


def leave(code: int) -> NoReturn:
    """Ends this process with an exit code; of several, where they end because one has failed, at once: what waits for
    a process that is gone, in a thread or a destructor, would keep the interpreter."""
    if code and several_processes():
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
    sys.exit(code)


class Lasting:
    """A stream that goes on, into nothing, where its reader went away: `| head -1`, or a terminal that was closed.

    Whoever looks at a run must not end it. Everything else is the stream's own.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._attempt(self._stream.write, text) or 0

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, call: Any, *arguments: str) -> int | None:
        try:
            result: int | None = call(*arguments)
            return result
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
        # What other libraries and processes of ours write to the same descriptor goes there too.
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self._stream.fileno())
        os.close(nothing)
        return None


def keep_writing() -> None:
    """Makes standard output and standard error Lasting. A character that a pipe cannot take is shown by its number."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        if stream is not None and not isinstance(stream, Lasting):
            setattr(sys, name, Lasting(stream))
