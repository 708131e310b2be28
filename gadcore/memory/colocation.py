"""Student, discriminator, reference policy and engine on one device, by turns.

Entering a state (gadcore/memory/holdings.py) does, in this order:

    the engine sleeps, unless the state samples or synchronises
    what the state does not need leaves the device, in whole buffers, what was coming for another state included
    freed memory is given back, so that the engine's own allocator can have it
    the ledger is asked whether the rest fits; the run ends here if not
    what the state needs comes in
    the engine wakes: its weights to synchronise, its key-value cache to sample

and what the next state needs starts coming where it fits. Any other order of these calls uses memory twice, or hands
vLLM weights that it throws away when it wakes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from gadcore.config.settings import MemorySettings
from gadcore.distributed.fsdp import local
from gadcore.distributed.world import ALONE, World
from gadcore.errors import UserError
from gadcore.memory.arena import Arena
from gadcore.memory.holdings import (
    ALWAYS,
    CHANGES,
    FOLLOWS,
    HOLDINGS,
    NEEDS,
    EnginePart,
    Holding,
    State,
    engine_parts,
    needs,
)
from gadcore.memory.ledger import ALLOCATOR, GIB, PROCESS, Ledger
from gadcore.memory.meter import Meter, meter_of
from gadcore.memory.placement import tier_name
from gadcore.memory.tiers import make_tier

# By then a step holds what every later one does.
_CLOSE_VISITS = 3
# Of the limit, what a load ahead leaves free: no batch is like the last one, and none may fail for what comes next.
_SPARE = 0.1


class Sleeper(Protocol):
    """What is asked of an engine; gadcore.rollout.engine.Engine is one."""

    def sleep(self) -> None: ...
    def wake(self, part: EnginePart) -> None: ...
    def held(self) -> Mapping[Holding, int]: ...


class _NoSleeper:
    """Stands for an engine until there is one."""

    def sleep(self) -> None: ...
    def wake(self, part: EnginePart) -> None: ...
    def held(self) -> dict[Holding, int]:
        return {}


class Colocation:
    """Which holdings are on the device, and the ledger of them.

    engine: may be set later, where an engine is to be made while holdings are away; before begin().
    """

    def __init__(
        self,
        device: torch.device,
        settings: MemorySettings,
        folder: Path,
        engine: Sleeper | None = None,
        *,
        shared: bool,
        meter: Meter | None = None,
        on_copy: Callable[[str, float, float, int], None] | None = None,
        world: World = ALONE,
    ) -> None:
        """folder: of the `file` tier. shared: the engine computes with the trainer's own weights.
        on_copy: told of every move at its end: what, start and end by time.perf_counter(), bytes.
        world: whose processes enter every state together; what does not fit or fails on one of them ends it on all.

        Raises UserError where the device has no tier of that name.
        """
        self.device, self.settings, self.folder = device, settings, folder
        self.engine: Sleeper = _NoSleeper() if engine is None else engine
        self.shared = shared
        self._on_copy = on_copy
        self.tier = tier_name(settings.offload, device.type)
        self.meter = meter_of(device) if meter is None else meter
        self._world = world
        most = self.meter.limit if device.type == "cuda" else self.meter.limit // world.neighbours
        limit = most if settings.limit_gib is None else int(settings.limit_gib * GIB)
        self.ledger = Ledger(limit)
        self.state: State | None = None
        self._arenas: dict[Holding, Arena] = {}
        self._staying: dict[Holding, Callable[[], Iterable[Tensor]]] = {}
        self._gradients: dict[Holding, Sequence[Tensor]] = {}
        self._seen: dict[str, float] = {}
        self._moving_s = 0.0
        self._visits: Counter[State] = Counter()
        self._states: dict[State, dict[str, int]] = {}

    # What there is

    def add(
        self,
        holding: Holding,
        tensors: Callable[[], Iterable[Tensor]],
        aliases: Iterable[Tensor] = (),
        *,
        frozen: bool = False,
    ) -> None:
        """Takes over tensors of the device, which hold their values now; where holdings move, they wait from here on.

        aliases: other tensors that look at the same memory, and must go on doing so.
        frozen: the values never change.
        """
        if holding not in HOLDINGS:
            raise ValueError(f"unknown holding {holding}: use one of {', '.join(HOLDINGS)}")
        if self.tier == "none" or (self.shared and holding in ALWAYS):
            self._staying[holding] = tensors
        elif held := [*tensors(), *aliases]:
            # Else it lies elsewhere, as an optimizer whose masters are the host's.
            place = lambda size: make_tier(self.tier, self.device, self.folder, holding, size)  # noqa: E731
            with self._world.agreeing():
                self._arenas[holding] = Arena(holding, held, place, frozen=frozen)
            # Whoever comes next looks at what is free.
            self.meter.give_back()
        self._account()

    def add_gradients(self, holding: Holding, parameters: Iterable[Tensor]) -> None:
        """Parameters whose gradients must be gone when their state ends."""
        self._gradients[holding] = list(parameters)

    @contextmanager
    def there(self, *holdings: Holding) -> Iterator[None]:
        """Has holdings on the device inside the block, where they move: for what is set up before the first state."""
        arenas = {holding: self._arenas[holding] for holding in holdings if holding in self._arenas}
        for holding, arena in arenas.items():
            with self._copying(f"{holding} in", arena.bytes):
                arena.come()
        yield
        for holding, arena in arenas.items():
            with self._copying(f"{holding} out", arena.bytes):
                arena.leave()
        if arenas:
            self.meter.give_back()

    def begin(self) -> None:
        """Everything that is there from the beginning has been added: what else is in use is the process's own."""
        self.meter.give_back()
        self._account()
        self.ledger.update({PROCESS: max(0, self.meter.in_use() - self.ledger.total)})

    # States

    def enter(self, state: State) -> None:
        """Makes the device hold what `state` needs. UserError where that does not fit, or a copy fails."""
        if state not in NEEDS:
            raise ValueError(f"unknown state {state}: use one of {', '.join(NEEDS)}")
        if state == self.state:
            return
        if state == "rollout" and self.state != "synchronise":
            raise RuntimeError(f"rollout follows synchronise, not {self.state}: an engine that slept has no weights")
        self.observe()
        needed = needs(state, shared=self.shared)
        self._no_gradients(needed)
        if not engine_parts(state):
            self.engine.sleep()
        with self._world.agreeing():
            self._make_room(state, needed)
        with self._world.agreeing():
            for holding, arena in self._arenas.items():
                if holding in needed and not arena.resident:
                    with self._copying(f"{holding} in", arena.bytes):
                        arena.come()
                if holding in CHANGES[state]:
                    arena.changed()
        awake = [] if self.state is None else engine_parts(self.state)
        for part in engine_parts(state):
            if part not in awake:
                self.engine.wake(part)
        self._account()
        self.meter.reset_peak()
        self.state = state
        self._visits[state] += 1
        self._prefetch(state)

    def _make_room(self, state: State, needed: frozenset[Holding]) -> None:
        """What `state` does not need leaves; UserError where what it needs does not fit then."""
        for holding, arena in self._arenas.items():
            if holding in needed:
                continue
            arena.not_yet()
            if arena.resident:
                with self._copying(f"{holding} out", arena.bytes):
                    arena.leave()
        if self._arenas:
            self.meter.give_back()
        self._account(coming=needed)
        self.ledger.check(state)

    def finish_work(self) -> None:
        """Waits until the device has computed what it was given: its time is that of the phase that gave it."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def observe(self) -> None:
        """Notes what the present state held and used at most. UserError where that was above the limit."""
        if self.state is not None:
            with self._world.agreeing():
                self._observe(self.state)

    def _observe(self, state: State) -> None:
        peak = self.meter.peak()
        if self.meter.kept() is None and (self._arenas or self._visits[state] <= _CLOSE_VISITS):
            # Else bytes are in use that nobody can name. The next pass takes its pages anew for it, a few percent of a
            # step: where nothing moves, only the first visits are looked at so closely.
            self.meter.give_back()
        self._account()
        held = self.ledger.total
        found = {f"memory/{state}_held": held, f"memory/{state}_resident": self.meter.in_use()}
        if peak is not None:
            peak = max(peak, held, int(self._seen.get(f"memory/{state}_peak", 0)))
            found[f"memory/{state}_peak"] = peak
        self._seen |= found
        # What the allocator keeps is of the work.
        self._states[state] = {name: size for name, size in self.ledger.held.items() if name != ALLOCATOR}
        if peak is not None:
            self.ledger.seen(state, peak)

    def take_step(self) -> dict[str, float]:
        """What happened since the last call, for metrics.

        memory/STATE_held, _resident, _peak: bytes by the ledger, in use at the state's end, at most.
        memory/moving_s: seconds that the step waited for holdings to leave and come, where something moves at all.
        """
        self.observe()
        seen, self._seen = self._seen, {}
        if self._arenas:
            seen["memory/moving_s"], self._moving_s = self._moving_s, 0.0
        return seen

    def readable(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values of tensors of any holdings, wherever they are: memory that can be read, without copies.

        To be let go before the next state is entered.
        """
        away = {
            id(tensor): values
            for arena in self._arenas.values()
            if not arena.resident
            for tensor, values in arena.readable()
        }
        return {name: away.get(id(tensor), tensor.detach()) for name, tensor in tensors.items()}

    def summary(self) -> dict[str, Any]:
        """What summary.json says."""
        states = {}
        for state, held in self._states.items():
            there = [name for name in NEEDS[state] if name in self._gradients]
            gradients = {name: sum(map(_gradient_bytes, self._gradients[name])) for name in there}
            work = max(0, self.ledger.work.get(state, 0) - sum(gradients.values()))
            states[state] = held | gradients | ({"work": work} if work else {})
        return {
            "offload": self.tier,
            "shared_weights": self.shared,
            "process_bytes": self.ledger.held.get(PROCESS, 0),
            "limit_bytes": self.ledger.limit,
            "states": states,
        }

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Tells an out-of-memory error of the device as a UserError that lists the holders."""
        try:
            yield
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise self._out_of_memory() from error
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):
                raise
            raise self._out_of_memory() from error

    @contextmanager
    def _copying(self, what: str, size: int) -> Iterator[None]:
        start = time.perf_counter()
        yield
        end = time.perf_counter()
        self._moving_s += end - start
        if self._on_copy is not None:
            self._on_copy(what, start, end, size)

    def close(self) -> None:
        for arena in self._arenas.values():
            arena.close()

    def _out_of_memory(self) -> UserError:
        where = "while the run is set up" if self.state is None else f"in state {self.state}"
        return UserError(f"out of memory {where}, which {self.ledger.over()}")

    def _no_gradients(self, needed: frozenset[Holding]) -> None:
        for holding, parameters in self._gradients.items():
            if holding not in needed and any(p.grad is not None for p in parameters):
                raise RuntimeError(f"{holding} are still there when their state ends: no optimizer step cleared them")

    def _account(self, coming: frozenset[Holding] = frozenset()) -> None:
        held: dict[str, int] = {
            holding: arena.bytes if holding in coming else arena.device_bytes for holding, arena in self._arenas.items()
        }
        for holding, tensors in self._staying.items():
            held[holding] = _storage_bytes(tensors())
        held[ALLOCATOR] = self.meter.kept() or 0
        self.ledger.update(held | {"engine.weights": 0, "engine.kv_cache": 0} | dict(self.engine.held()))

    def _prefetch(self, state: State) -> None:
        if not self.settings.prefetch or state not in FOLLOWS:
            return
        following = FOLLOWS[state]
        if following == "reference" and "reference.parameters" not in self._arenas:
            following = FOLLOWS[following]
        for holding in sorted(needs(following, shared=self.shared)):
            arena = self._arenas.get(holding)
            if arena is None or arena.resident:
                continue
            if arena.tier.loads_ahead:
                # What the state works with is unknown until it has been seen once.
                work = self.ledger.work.get(state)
                room = self.ledger.limit * (1 - _SPARE)
                if work is None or self.ledger.needed(work) + arena.bytes > room:
                    continue
            arena.come_soon()
            self._account()


def _gradient_bytes(parameter: Tensor) -> int:
    dtype = parameter.grad_dtype or parameter.dtype
    return local(parameter).numel() * dtype.itemsize


def _storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind tensors, each storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
