"""What the settings of memory mean on a kind of device. Imports no torch: the planner reads it too."""

from __future__ import annotations

from typing import Literal

from gadcore.errors import UserError

Offload = Literal["none", "pinned", "file"]


def tier_name(offload: Literal["auto", "none", "pinned", "file"], device: str) -> Offload:
    """memory.offload for a device of type "cpu" or "cuda", with "auto" resolved.

    Raises UserError where such a device has no tier of that name.
    """
    on_cuda = device == "cuda"
    if offload == "auto":
        return "pinned" if on_cuda else "none"
    if offload == "pinned" and not on_cuda:
        raise UserError(
            "memory.offload = pinned moves what waits from a GPU into host memory, and this run is on the CPU: use "
            "file or none"
        )
    if offload == "file" and on_cuda:
        raise UserError("memory.offload = file frees host memory and this run is on a GPU: use pinned or none")
    return offload
