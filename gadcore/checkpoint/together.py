"""Checkpoints that all processes of a job write together: each its shards, the first one everything else.

The first process makes the folder under its temporary name, all write into it, and when the sizes and checksums of all
files are known it gets its name: a job that dies at any moment leaves the whole checkpoint or none. Nothing of it waits
for a process that failed: an error of one is raised on all.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from gadcore.checkpoint.shards import Writer, write
from gadcore.checkpoint.store import STATE, at, check_arguments, new_checkpoint, write_manifest
from gadcore.distributed.world import World
from gadcore.errors import UserError

# Seconds after which a folder that another node has made is seen, on a file system that all share.
_SEEN_WITHIN = 10.0


@dataclass
class _Writing:
    """A checkpoint on its way. folder: on the first process what gives it its name."""

    path: Path
    step: int
    folder: ExitStack
    writer: Writer
    done: Future[None]


class Together:
    """Saves for a job of several processes; every process calls the same, with what it holds."""

    def __init__(self, world: World, *, asynchronous: bool = False, timeout_s: float = 1800.0) -> None:
        """asynchronous: save() returns when what is to be written lies in host memory; finish() waits for the files.
        timeout_s: of what a process waits for the others while it is planned who writes what.
        """
        self._world, self.is_asynchronous = world, asynchronous
        # Planning goes on beside the collectives of training.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self._thread = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._writing: _Writing | None = None

    def save(
        self,
        root: Path,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        keep: int,
        *,
        pinned: int | None = None,
    ) -> Path:
        """As gadcore.checkpoint.store.save(). tensors: DTensors, of which each process writes what it holds; another
        tensor is written by one of those that have one of that name. state: the first process's counts.

        Where it is asynchronous the tensors must not change before finish(). Raises UserError on all processes.
        """
        self.finish()
        check_arguments(tensors, keep)
        stack, place = ExitStack(), Path()
        with self._world.agreeing():
            if self._world.is_first:
                with ExitStack() as making:
                    place = making.enter_context(new_checkpoint(root, step, keep, pinned))
                    (place / STATE).write_text(json.dumps(dict(state)))
                    stack = making.pop_all()
        try:
            folder = self._world.broadcast_object(place)
            with self._world.agreeing():
                self._seen(folder / STATE)
            writer = Writer(folder, self._world.rank, self._world.size, like=folder / STATE)
            done: Future[None] = Future()
            if self._thread is None:
                write(tensors, writer, self._group)
                done.set_result(None)
            else:
                done = self._thread.submit(write, _in_host_memory(tensors), writer, self._group)
        except BaseException as error:
            stack.__exit__(type(error), error, error.__traceback__)
            raise
        self._writing = _Writing(at(root, step), step, stack, writer, done)
        return at(root, step) if self._thread is not None else self.finish() or at(root, step)

    def finish(self) -> Path | None:
        """Returns when the last checkpoint is whole, with its path; None where nothing is on its way.

        Raises UserError on all processes where one could not write; there is no such checkpoint then.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return None
        error: UserError | None = None
        try:
            with writing.folder:
                writing.done.result()
                files: dict[str, Any] = {}
                for found in self._world.all_gather_objects(writing.writer.files):
                    files |= found
                if self._world.is_first:
                    write_manifest(writing.writer.folder, writing.step, files, ranks=self._world.size)
        except UserError as raised:
            error = raised
        # The last part is the first process's alone.
        self._world.agree(error)
        return writing.path

    def close(self) -> None:
        """Drops what is on its way: it was not finished."""
        writing, self._writing = self._writing, None
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
        if writing is not None:
            error = UserError("the checkpoint was not finished")
            writing.folder.__exit__(UserError, error, None)

    def _seen(self, file: Path) -> None:
        """Raises UserError where a file that the first process has just written is not to be seen from here."""
        end = time.monotonic() + _SEEN_WITHIN
        while not file.is_file():
            if time.monotonic() > end:
                raise UserError(
                    f"rank {self._world.rank} on {socket.gethostname()} does not see {file.parent.parent}, where the "
                    "first one has begun a checkpoint: put run.dir on a file system that all nodes share"
                )
            time.sleep(0.1)


def _in_host_memory(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """The same, without what lies on a device: training needs the room there. What lies in host memory stays as it is:
    nothing changes it before the next optimizer step."""
    return {name: {key: _host(tensor) for key, tensor in group.items()} for name, group in tensors.items()}


def _host(tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor):
        local = tensor._local_tensor
        if local.device.type == "cpu":
            return tensor
        return DTensor(local.cpu(), tensor._spec, requires_grad=False)  # type: ignore[call-arg]
    # Small, and some are changed by others: adapters, random states, step counts.
    return tensor.detach().to("cpu", copy=True)
