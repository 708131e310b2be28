"""Stage 2: holdings of 10 GB that share the device by turns with a stand-in engine, for two steps: what the ledger says
that a state worked with, against what it did work with."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from bench.gpu.place import Place, Row, attempt, gate
from gadcore.config.settings import MemorySettings
from gadcore.memory.colocation import Colocation
from gadcore.memory.holdings import FOLLOWS, HOLDINGS, EnginePart, Holding, State

STEPS = 2
# Parameters once, moments twice, as of fp32 and AdamW; the sum is 8.
PARTS = {
    "student.parameters": 1,
    "student.optimizer": 2,
    "reference.parameters": 1,
    "discriminator.parameters": 1,
    "discriminator.optimizer": 2,
}
TENSORS = 40
# The allocator's blocks are of 2 or 20 MiB.
SLACK = 64 << 20


class StandIn:
    """An engine that holds memory as vLLM does: nothing while it sleeps."""

    def __init__(self, device: torch.device, sizes: dict[EnginePart, int]) -> None:
        self.device, self.sizes = device, sizes
        self._parts: dict[EnginePart, Tensor] = {}

    def sleep(self) -> None:
        self._parts.clear()

    def wake(self, part: EnginePart) -> None:
        self._parts[part] = torch.ones(self.sizes[part], dtype=torch.uint8, device=self.device)

    def held(self) -> dict[Holding, int]:
        return {f"engine.{part}": tensor.nbytes for part, tensor in self._parts.items()}


def rows(place: Place) -> Iterator[Row]:
    whole = 64 << 20 if place.tiny else int(min(10e9, 0.12 * place.memory))
    found: list[Row] = []
    yield attempt("all", lambda: _walk(place, whole, found), place)
    yield from found


def _walk(place: Place, whole: int, found: list[Row]) -> Row:
    """Two steps; appends a row a state, and returns that of the moves."""
    moves: list[tuple[float, int]] = []
    settings = MemorySettings(offload="pinned" if place.on_gpu else "file")
    unit = whole // sum(PARTS.values())
    sizes: dict[EnginePart, int] = {"weights": unit // 2, "kv_cache": unit}
    with TemporaryDirectory() as folder:
        memory = Colocation(
            place.device,
            settings,
            Path(folder),
            StandIn(place.device, sizes),
            shared=False,
            on_copy=lambda what, start, end, size: moves.append((end - start, size)),
        )
        expected: dict[str, list[Tensor]] = {}
        began = time.perf_counter()
        for holding, parts in PARTS.items():
            assert holding in HOLDINGS
            count = parts * unit // TENSORS // 4
            held = [torch.full((count,), float(i), device=place.device) for i in range(TENSORS)]
            expected[holding] = held
            memory.add(holding, lambda held=held: held)
        memory.begin()
        # Host memory is locked once, which takes long.
        setup_s, moves[:] = time.perf_counter() - began, []
        start: State = "synchronise"
        moving = []
        for _ in range(STEPS):
            state = start
            while True:
                seconds = place.seconds(lambda state=state: memory.enter(state))
                work = _work(state, unit, place)
                memory.observe()
                moving.append({"case": state, "enter_s": seconds, "work": work})
                state = FOLLOWS[state]
                if state == start:
                    break
        memory.enter("rest")
        for row in moving[-len(FOLLOWS) :]:
            said = memory.ledger.work.get(row["case"], 0)
            # A CPU's resident memory is counted in whole pages of whatever else the process does.
            near = abs(said - row["work"]) <= SLACK + 0.05 * row["work"]
            row |= {"ledger": said, "status": "ok"} | ({"gate": gate(near)} if place.on_gpu else {})
            found.append(row)
        values = memory.readable({f"{name} {i}": t for name, held in expected.items() for i, t in enumerate(held)})
        kept = all(bool((value == float(name.split()[1])).all()) for name, value in values.items())
        del values
        memory.close()
    seconds, size = sum(s for s, _ in moves), sum(n for _, n in moves)
    return {
        "bytes": whole,
        "setup_s": setup_s,
        "moved_bytes": size,
        "moving_s": seconds,
        "bytes_per_s": size / seconds if seconds else None,
        "steps": STEPS,
        "gate": gate(kept),
    }


def _work(state: State, unit: int, place: Place) -> int:
    """Takes and frees what a state works with, a different amount for each; returns its bytes."""
    size = unit // 4 * (1 + list(FOLLOWS).index(state) % 4)
    work = torch.ones(size, dtype=torch.uint8, device=place.device)
    work.add_(1)
    place.synchronise()
    return work.nbytes
