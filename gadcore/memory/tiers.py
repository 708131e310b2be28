"""Where a holding waits while others have the device: in page-locked memory of the host, or in a file.

A tier keeps one copy of an arena's buffer. store() and load() raise before anything is lost: after a failed store() the
buffer is the only copy, after a failed load() the tier's is.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from gadcore.errors import UserError
from gadcore.memory.page_locked import page_locked, unlock

_CHUNK = 1 << 26


class Tier(Protocol):
    """A place for one buffer of bytes (a contiguous uint8 tensor)."""

    name: str
    # Whether start_load() fills device memory while something else computes.
    loads_ahead: bool

    def store(self, part: Tensor, offset: int) -> None:
        """Keeps a copy of a part of the buffer, its bytes from `offset` on. The part may be freed afterwards."""

    def start_load(self, buffer: Tensor | None) -> None:
        """Announces load(): into this buffer, where loads_ahead."""

    def stop_load(self) -> None:
        """Takes start_load() back. Its buffer may be freed afterwards."""

    def load(self, buffer: Tensor) -> None:
        """Fills the buffer with what store() kept."""

    def readable(self) -> Tensor:
        """What store() kept, as a CPU tensor of bytes, without a copy. Valid until the next store()."""

    def close(self) -> None:
        """Gives up the copy."""


class FileTier:
    """A file without a name: it takes its space at once, and is gone with the process, however that ends."""

    name = "file"
    loads_ahead = False

    def __init__(self, folder: Path, holding: str, size: int) -> None:
        """Raises UserError where the folder cannot hold `size` bytes more."""
        self.folder, self.holding, self.size = folder, holding, size
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor, path = tempfile.mkstemp(prefix=f".{holding}-", dir=folder)
        except OSError as error:
            raise self._failed("make a file for", error, "nothing is lost") from error
        os.unlink(path)
        self._file = descriptor
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            os.close(descriptor)
            raise self._failed("reserve space for", error, "nothing is lost") from error

    def _failed(self, what: str, error: OSError, then: str) -> UserError:
        return UserError(
            f"cannot {what} {self.holding} ({self.size / 2**20:.0f} MiB) in {self.folder}: {error.strerror}; {then}: "
            "free some space, choose another memory.dir, or set memory.offload to none"
        )

    def store(self, part: Tensor, offset: int) -> None:
        view, position = part.numpy().data, 0
        try:
            while position < len(view):
                position += os.pwrite(self._file, view[position : position + _CHUNK], offset + position)
        except OSError as error:
            raise self._failed("write", error, "it is still in memory") from error

    def start_load(self, buffer: Tensor | None) -> None:
        os.posix_fadvise(self._file, 0, self.size, os.POSIX_FADV_WILLNEED)

    def stop_load(self) -> None:
        # What was read ahead is the kernel's.
        pass

    def load(self, buffer: Tensor) -> None:
        view, position = buffer.numpy().data, 0
        try:
            while position < self.size:
                read = os.preadv(self._file, [view[position : position + _CHUNK]], position)
                if not read:
                    raise OSError(errno.EIO, "the file ends too early")
                position += read
        except OSError as error:
            raise self._failed("read", error, "go on from the last checkpoint") from error

    def readable(self) -> Tensor:
        # Private: a reader that writes does not change the copy.
        return torch.frombuffer(mmap.mmap(self._file, self.size, access=mmap.ACCESS_COPY), dtype=torch.uint8)

    def close(self) -> None:
        os.close(self._file)


class PinnedTier:
    """Page-locked memory of the host, copied on a stream of its own beside what the device computes."""

    name = "pinned"
    loads_ahead = True

    def __init__(self, device: torch.device, holding: str, size: int) -> None:
        """Raises UserError where the host has no `size` bytes to lock. They are locked once: that takes long."""
        self.device = device
        self._host = page_locked(holding, size, "set memory.offload to none")
        self._stream = torch.cuda.Stream(device)
        self._loading: torch.cuda.Event | None = None

    def store(self, part: Tensor, offset: int) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            self._host[offset : offset + len(part)].copy_(part, non_blocking=True)
        # The caller frees the part: its memory must not be given away before the copy has read it.
        self._stream.synchronize()

    def start_load(self, buffer: Tensor | None) -> None:
        if buffer is None:
            raise ValueError("device memory is needed to load ahead")
        # The buffer's memory may have been another tensor's, which what is queued there still reads.
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            buffer.copy_(self._host, non_blocking=True)
            self._loading = torch.cuda.Event()
            self._loading.record(self._stream)
        # Wherever the buffer is freed while the copy writes, its memory is nobody's until the copy is done.
        buffer.record_stream(self._stream)

    def stop_load(self) -> None:
        if self._loading is not None:
            self._loading.synchronize()
            self._loading = None

    def load(self, buffer: Tensor) -> None:
        if self._loading is None:
            self.start_load(buffer)
        assert self._loading is not None
        torch.cuda.current_stream(self.device).wait_event(self._loading)
        self._loading = None

    def readable(self) -> Tensor:
        return self._host

    def close(self) -> None:
        # No copy may find its memory unlocked: load() lets the device wait, not the host.
        self._stream.synchronize()
        unlock(self._host)
        del self._host


def make_tier(name: str, device: torch.device, folder: Path, holding: str, size: int) -> Tier:
    """The tier of that name, "pinned" or "file", for `size` bytes."""
    if name == "pinned":
        return PinnedTier(device, holding, size)
    return FileTier(folder, holding, size)
