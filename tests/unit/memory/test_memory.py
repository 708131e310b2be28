"""Arenas, tiers, the ledger, and the order in which a state is entered."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gadcore.config.settings import MemorySettings
from gadcore.errors import UserError
from gadcore.memory import resident
from gadcore.memory.arena import Arena
from gadcore.memory.colocation import Colocation
from gadcore.memory.holdings import ALWAYS, CHANGES, NEEDS, needs
from gadcore.memory.ledger import GIB, PROCESS, Ledger
from gadcore.memory.meter import HostMeter
from gadcore.memory.placement import tier_name
from gadcore.memory.tiers import FileTier

CPU = torch.device("cpu")


class MemoryTier:
    """A tier that keeps a copy, tells what is asked of it, and fails when it is told to."""

    name = "pinned"

    def __init__(self, size: int, *, loads_ahead: bool = False) -> None:
        self.kept = torch.zeros(size, dtype=torch.uint8)
        self.loads_ahead = loads_ahead
        self.calls: list[str] = []
        self.fails = ""

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if self.fails == name:
            raise UserError(f"{name} failed")

    def store(self, part: Tensor, offset: int) -> None:
        self._call("store")
        self.kept[offset : offset + len(part)].copy_(part)

    def start_load(self, buffer: Tensor | None) -> None:
        self._call("start_load")
        assert (buffer is not None) == self.loads_ahead

    def stop_load(self) -> None:
        self._call("stop_load")

    def load(self, buffer: Tensor) -> None:
        # Half of it arrives before a failure.
        buffer[: len(buffer) // 2].copy_(self.kept[: len(buffer) // 2])
        self._call("load")
        buffer.copy_(self.kept)

    def readable(self) -> Tensor:
        return self.kept

    def close(self) -> None:
        self._call("close")


def tensors() -> list[Tensor]:
    """Fused rows and the views into them, another dtype, an odd size, a scalar, a transposed one."""
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(6, 5, generator=generator)
    return [
        fused,
        fused[:4],
        fused[4:],
        torch.randn(3, generator=generator, dtype=torch.float64),
        torch.randint(0, 9, (), generator=generator, dtype=torch.int16),
        torch.randn(4, 7, generator=generator).T,
    ]


def test_tensors_keep_values_identity_and_common_memory_through_a_move() -> None:
    held = tensors()
    before = [t.clone() for t in held]
    tier: list[MemoryTier] = []
    arena = Arena("x", held, lambda size: tier.append(MemoryTier(size)) or tier[0])
    # 120, 24, 2 and 112 bytes, each in whole cache lines.
    assert arena.bytes == 128 + 64 + 64 + 128
    assert tier[0].calls == ["store"] * 4, "fused rows and the views into them are one"
    tier[0].calls.clear()
    arena.come()
    for _ in range(2):
        assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(held, before, strict=True))
        arena.leave()
        assert not arena.resident and arena.device_bytes == 0
        assert all(t.numel() == 0 for t in held)
        assert all(torch.equal(values, b) for (_, values), b in zip(arena.readable(), before, strict=True))
        arena.come()
        held[1].add_(1)
        before = [t.clone() for t in held]
        assert torch.equal(held[0][:4], held[1]), "the views must go on looking at the fused rows"
        arena.changed()
    assert tier[0].calls == ["load", "load", "store", "load"], "what did not change is not stored again"


def test_a_view_of_no_rows_takes_no_place() -> None:
    """A shard of a head of one row, where another process has that row: padded memory, and nothing to see of it."""
    padded = torch.arange(8.0)
    nothing = padded.view(1, 8)[:0]
    arena = Arena("x", [padded, nothing], MemoryTier)
    assert arena.bytes == 64
    arena.come()
    assert nothing.shape == (0, 8) and padded.tolist() == list(range(8))
    assert nothing.untyped_storage().data_ptr() == padded.untyped_storage().data_ptr()


def test_what_did_not_change_is_stored_once() -> None:
    weight = torch.ones(9)
    tier = MemoryTier(64)
    arena = Arena("reference", [weight], lambda size: tier, frozen=True)
    for _ in range(3):
        arena.come()
        arena.leave()
    assert tier.calls == ["store", "load", "load", "load"]
    with pytest.raises(RuntimeError, match="declared not to change"):
        arena.changed()


def test_a_parameter_that_waits_cannot_be_computed_with() -> None:
    linear = nn.Linear(4, 4)
    arena = Arena("x", list(linear.parameters()), MemoryTier)
    with pytest.raises(RuntimeError):
        linear(torch.ones(1, 4))
    arena.come()
    linear(torch.ones(1, 4)).sum().backward()


@pytest.mark.parametrize("fails", ["store", "load"])
def test_a_move_that_fails_half_way_loses_nothing(fails: str) -> None:
    held = tensors()
    before = [t.clone() for t in held]
    tier = MemoryTier(10_000)
    arena = Arena("x", held, lambda size: MemoryTier.__init__(tier, size) or tier)
    if fails == "store":
        arena.come()
        arena.changed()
    tier.fails = fails
    with pytest.raises(UserError, match=fails):
        arena.leave() if fails == "store" else arena.come()
    assert arena.resident == (fails == "store")
    tier.fails = ""
    arena.leave()
    arena.come()
    assert all(torch.equal(a, b) for a, b in zip(held, before, strict=True))


def test_the_file_is_nameless_and_as_large_as_its_holding(tmp_path: Path) -> None:
    tier = FileTier(tmp_path / "new", "student.optimizer", 1 << 20)
    assert list((tmp_path / "new").iterdir()) == []
    buffer = torch.randint(0, 256, (1 << 20,), dtype=torch.uint8)
    for start, end in ((1000, 1 << 20), (0, 1000)):
        tier.store(buffer[start:end], start)
    again = torch.empty_like(buffer)
    tier.start_load(None)
    tier.load(again)
    assert torch.equal(buffer, again) and torch.equal(tier.readable(), buffer)
    read = tier.readable()
    read.zero_()
    assert torch.equal(tier.readable(), buffer), "a reader changed the copy"
    tier.close()


@pytest.mark.skipif(os.geteuid() != 0 or not Path("/proc/mounts").exists(), reason="mounts a small file system")
def test_a_full_disk_is_told_with_the_holding_and_the_folder(tmp_path: Path) -> None:
    if os.system(f"mount -t tmpfs -o size=1m tmpfs {tmp_path} 2>/dev/null") != 0:
        pytest.skip("no file system can be mounted here")
    try:
        with pytest.raises(UserError, match=rf"reserve space for student.optimizer \(2 MiB\) in {tmp_path}.*No space"):
            FileTier(tmp_path, "student.optimizer", 2 << 20)
        assert list(tmp_path.iterdir()) == []
    finally:
        os.system(f"umount {tmp_path}")


def test_a_file_that_cannot_be_written_leaves_the_buffer(tmp_path: Path) -> None:
    weight = torch.arange(1 << 16, dtype=torch.float32)
    arena = Arena("student.parameters", [weight], lambda size: FileTier(tmp_path, "student.parameters", size))
    arena.come()
    arena.changed()
    descriptor = arena.tier._file  # type: ignore[attr-defined]
    read_only = os.open("/dev/full", os.O_WRONLY)
    kept = os.dup(descriptor)
    os.dup2(read_only, descriptor)
    with pytest.raises(UserError, match="cannot write student.parameters .*No space left.*still in memory"):
        arena.leave()
    assert arena.resident and torch.equal(weight, torch.arange(1 << 16, dtype=torch.float32))
    os.dup2(kept, descriptor)
    arena.leave()
    os.ftruncate(descriptor, 100)
    with pytest.raises(UserError, match="cannot read student.parameters .*go on from the last checkpoint"):
        arena.come()
    os.close(read_only)
    os.close(kept)


def test_tiers_that_a_device_does_not_have_are_refused() -> None:
    assert tier_name("auto", "cpu") == "none"
    assert tier_name("auto", "cuda") == "pinned"
    with pytest.raises(UserError, match="memory.offload = pinned"):
        tier_name("pinned", "cpu")
    with pytest.raises(UserError, match="memory.offload = file"):
        tier_name("file", "cuda")


def test_pages_are_dropped_and_counted() -> None:
    HostMeter().give_back()
    block = torch.empty(64 << 20, dtype=torch.uint8)
    assert resident.resident_bytes(block) < 8 << 20, "pages that were never written are not in memory"
    block[: 32 << 20] = 1
    assert 32 << 20 <= resident.resident_bytes(block) <= 40 << 20
    resident.drop_pages(block)
    assert resident.resident_bytes(block) < 1 << 20
    assert not block[2 << 20 : 4 << 20].any()
    with pytest.raises(ValueError, match="contiguous"):
        resident.drop_pages(block.view(-1, 2).T)


def test_what_malloc_keeps_is_given_back() -> None:
    meter = HostMeter()
    meter.give_back()
    blocks = [torch.ones(64 << 10, dtype=torch.uint8) for _ in range(2000)]
    used = meter.in_use()
    holes = blocks[::2]
    del blocks
    meter.give_back()
    assert used - meter.in_use() > 50 << 20, "every second block of 64 KiB was freed, 62 MiB in all"
    assert meter.kept() is None and all(block.all() for block in holes)


def test_peak_is_that_since_the_reset() -> None:
    if not resident.reset_peak():
        pytest.skip("the kernel does not reset a peak here")
    block = torch.ones(64 << 20, dtype=torch.uint8)
    high = resident.peak()
    del block
    HostMeter().give_back()
    assert resident.reset_peak()
    assert resident.peak() < high - (48 << 20)


def test_ledger_names_the_holders_above_the_limit() -> None:
    ledger = Ledger(4 * GIB)
    ledger.update({PROCESS: GIB, "student.parameters": 2 * GIB})
    ledger.check("student")
    ledger.seen("student", peak=4 * GIB)
    ledger.update({"student.optimizer": GIB // 2})
    with pytest.raises(UserError) as caught:
        ledger.check("student")
    text = str(caught.value)
    assert "state student needs 4.50 GiB of 4.00 GiB allowed" in text
    assert "student.parameters 2.00, process 1.00, work 1.00, student.optimizer 0.50" in text
    assert "memory.offload" in text
    ledger.check("rollout")
    ledger.update({"student.parameters": 0})
    assert ledger.total == GIB + GIB // 2 and "student.parameters" not in ledger.held


class FakeMeter:
    """A device of `limit` bytes; bytes in use are what the test says."""

    def __init__(self, calls: list[str], limit: int = 1 << 30) -> None:
        self.calls, self.limit, self.used, self.most = calls, limit, 0, 0

    def in_use(self) -> int:
        return self.used

    def reset_peak(self) -> None:
        self.most = 0

    def peak(self) -> int:
        return self.most

    def kept(self) -> int:
        return 0

    def give_back(self) -> None:
        self.calls.append("give back")


class FakeEngine:
    """Holds its own weights and cache, and notes what is asked of it."""

    def __init__(self, calls: list[str]) -> None:
        self.calls, self.awake = calls, set()

    def sleep(self) -> None:
        self.calls.append("sleep")
        self.awake = set()

    def wake(self, part: str) -> None:
        self.calls.append(f"wake {part}")
        self.awake.add(part)

    def held(self) -> dict:
        return {"engine.weights": 128 * ("weights" in self.awake), "engine.kv_cache": 512 * ("kv_cache" in self.awake)}


class Machine:
    """A Colocation whose arenas, engine and allocator write into one list of calls."""

    def __init__(self, monkeypatch, *, ahead: bool = False, **settings: object) -> None:
        self.calls: list[str] = []
        self.meter, self.engine = FakeMeter(self.calls), FakeEngine(self.calls)
        self.parameters: dict[str, nn.Parameter] = {}

        def make(name, device, folder, holding, size):
            tier = MemoryTier(size, loads_ahead=ahead)
            say = self.calls.append

            def call(what: str) -> None:
                said = {"store": "out", "load": "in", "start_load": "soon", "stop_load": "not yet"}
                say(f"{holding} {said[what]}" if what in said else what)

            tier._call = call  # type: ignore[method-assign]
            return tier

        monkeypatch.setattr("gadcore.memory.colocation.make_tier", make)
        given = MemorySettings.model_validate({"offload": "file", **settings})
        self.memory = Colocation(CPU, given, Path(), self.engine, shared=False, meter=self.meter)
        for name in ("student.parameters", "student.optimizer", "discriminator.parameters", "discriminator.optimizer"):
            self.add(name)
        self.memory.add_gradients("student.gradients", [self.parameters["student.parameters"]])
        self.memory.begin()

    def add(self, name: str, **settings: bool) -> None:
        parameter = self.parameters[name] = nn.Parameter(torch.full((16,), float(len(self.parameters))))
        self.memory.add(name, lambda: [parameter], **settings)  # type: ignore[arg-type]

    def enter(self, state: str) -> list[str]:
        self.calls.clear()
        self.memory.enter(state)  # type: ignore[arg-type]
        return list(self.calls)


def test_a_step_moves_in_the_order_that_vllm_needs(monkeypatch) -> None:
    machine = Machine(monkeypatch, prefetch=False)
    assert machine.enter("student_update") == [
        "sleep", "give back", "student.parameters in", "student.optimizer in",
    ]  # fmt: skip
    assert machine.enter("synchronise") == ["student.optimizer out", "give back", "wake weights"]
    assert machine.enter("rollout") == ["student.parameters out", "give back", "wake kv_cache"]
    assert machine.enter("discriminator") == ["sleep", "give back", "discriminator.parameters in"]
    assert machine.enter("discriminator_update") == ["sleep", "give back", "discriminator.optimizer in"]
    machine.add("reference.parameters", frozen=True)
    assert machine.enter("reference") == [
        "sleep", "discriminator.parameters out", "discriminator.optimizer out", "give back", "reference.parameters in",
    ]  # fmt: skip
    # It has not changed: nothing is stored.
    assert machine.enter("student") == ["sleep", "give back", "student.parameters in"]
    assert machine.enter("student_update") == ["sleep", "give back", "student.optimizer in"]
    assert machine.enter("synchronise") == ["student.optimizer out", "give back", "wake weights"]
    assert machine.enter("rest")[0] == "sleep"
    assert machine.enter("reference")[-1] == "reference.parameters in"
    assert machine.enter("reference") == [], "the state is entered already"


@pytest.mark.parametrize("state", list(NEEDS))
def test_a_state_holds_what_it_needs_and_nothing_else(monkeypatch, state: str) -> None:
    machine = Machine(monkeypatch)
    machine.add("reference.parameters", frozen=True)
    for other in (*NEEDS, *(["synchronise"] if state == "rollout" else []), state):
        machine.enter(other)
    held = {name for name in machine.memory.ledger.held if name != PROCESS}
    gradients = {name for name in NEEDS[state] if name.endswith("gradients")}
    # Nothing lies frozen under adapters here.
    assert held == set(needs(state, shared=False)) - gradients - ALWAYS  # type: ignore[arg-type]
    assert CHANGES[state] <= NEEDS[state]  # type: ignore[index]


def test_rollout_comes_only_after_new_weights(monkeypatch) -> None:
    machine = Machine(monkeypatch)
    machine.enter("discriminator")
    with pytest.raises(RuntimeError, match="rollout follows synchronise, not discriminator"):
        machine.enter("rollout")


def test_values_survive_any_order_of_states_and_can_be_read_while_they_wait(monkeypatch) -> None:
    machine = Machine(monkeypatch)
    states = ["student_update", "synchronise", "rollout", "discriminator_update", "rest", "student_update"]
    for round_, state in enumerate(states * 3):
        machine.enter(state)
        for name in CHANGES[state]:  # type: ignore[index]
            with torch.no_grad():
                machine.parameters[name].fill_(100.0 + round_)
            values = {n: float(v[0]) for n, v in machine.memory.readable(machine.parameters).items()}
            assert values[name] == 100.0 + round_
    values = {n: float(v[3]) for n, v in machine.memory.readable(machine.parameters).items()}
    assert values["student.parameters"] == values["student.optimizer"] == 117.0
    assert values["discriminator.parameters"] == 115.0


def test_the_limit_ends_the_run_before_anything_comes_in(monkeypatch) -> None:
    machine = Machine(monkeypatch, limit_gib=130 / GIB)
    machine.enter("student_update")
    machine.enter("rest")
    machine.memory.ledger.limit = 127
    with pytest.raises(UserError, match="state student_update needs .*memory.limit_gib"):
        machine.enter("student_update")
    assert machine.calls == ["sleep", "give back"] and machine.memory.state == "rest"


def test_work_that_was_seen_is_expected_the_next_time(monkeypatch) -> None:
    machine = Machine(monkeypatch)
    machine.memory.ledger.limit = 1000
    machine.enter("student")
    machine.meter.most = 1200
    with pytest.raises(UserError, match="state student needs 0.00 GiB of 0.00 GiB allowed .*work"):
        machine.memory.take_step()


def test_gradients_that_outlive_their_state_are_an_error(monkeypatch) -> None:
    machine = Machine(monkeypatch)
    machine.enter("student")
    p = machine.parameters["student.parameters"]
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="student.gradients are still there"):
        machine.enter("synchronise")


def test_what_comes_next_is_loaded_ahead_only_where_it_fits(monkeypatch) -> None:
    machine = Machine(monkeypatch, ahead=True)
    machine.enter("synchronise")
    assert "soon" not in " ".join(machine.enter("rollout")), "what rollout works with is not known yet"
    machine.meter.most = 700
    machine.enter("discriminator")
    machine.enter("synchronise")
    assert "discriminator.parameters soon" in machine.enter("rollout")
    assert machine.memory.ledger.held["discriminator.parameters"] == 64
    assert machine.enter("discriminator").count("discriminator.parameters in") == 1
    machine.memory.ledger.limit = 760
    machine.enter("synchronise")
    assert "soon" not in " ".join(machine.enter("rollout"))


def test_an_allocator_that_does_not_tell_gives_back_at_first_and_where_holdings_move(monkeypatch) -> None:
    for offload, always in (("none", False), ("file", True)):
        machine = Machine(monkeypatch, offload=offload, prefetch=False)
        monkeypatch.setattr(machine.meter, "kept", lambda: None)
        looked = []
        for _ in range(5):
            machine.enter("discriminator")
            machine.calls.clear()
            machine.memory.observe()
            looked.append("give back" in machine.calls)
            machine.enter("student")
        assert looked == [True, True, True, always, always]


def test_metrics_and_summary_name_states_and_holders(monkeypatch) -> None:
    machine = Machine(monkeypatch)
    machine.enter("synchronise")
    machine.enter("rollout")
    machine.meter.used, machine.meter.most = 900, 1000
    row = machine.memory.take_step()
    assert row["memory/rollout_held"] == 640 and row["memory/rollout_resident"] == 900
    assert row["memory/rollout_peak"] == 1000 and row["memory/synchronise_held"] == 192
    assert row["memory/moving_s"] > 0
    row = machine.memory.take_step()
    assert row.keys() == {f"memory/rollout_{what}" for what in ("held", "resident", "peak")} | {"memory/moving_s"}
    assert row["memory/moving_s"] == 0
    states = machine.memory.summary()["states"]
    assert states["rollout"] == {"engine.weights": 128, "engine.kv_cache": 512, "work": 360}


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("[enforce fail] can't allocate memory: 9 bytes")],
)
def test_out_of_memory_is_told_with_the_holders(monkeypatch, error: Exception) -> None:
    machine = Machine(monkeypatch)
    machine.enter("synchronise")
    machine.enter("rollout")
    with pytest.raises(UserError, match="out of memory in state rollout.*engine.kv_cache"), machine.memory.explained():
        raise error
    with pytest.raises(RuntimeError, match="another"), machine.memory.explained():
        raise RuntimeError("another")


def test_the_base_under_adapters_stays_where_the_sampler_computes_with_it(monkeypatch) -> None:
    """Every state needs it: where others wait in a tier it stays, and is counted in every state."""
    machine = Machine(monkeypatch)
    machine.memory.shared = True
    base = torch.zeros(1000)
    address = base.data_ptr()
    machine.memory.add("base.parameters", lambda: [base])
    for state in ("student", "synchronise", "rollout", "rest"):
        machine.enter(state)
        assert machine.memory.ledger.held["base.parameters"] == 4000 and base.data_ptr() == address


def test_the_base_under_adapters_is_away_while_a_sampler_has_its_own(monkeypatch) -> None:
    """And is stored once: nobody changes it."""
    machine = Machine(monkeypatch, prefetch=False)
    # As few bits are: of several dtypes.
    base = [torch.arange(16, dtype=torch.uint8), torch.arange(4.0)]
    machine.memory.add("base.parameters", lambda: base, frozen=True)
    with machine.memory.there("base.parameters", "student.parameters"):
        assert base[0].sum() == 120
    assert base[0].numel() == 0
    assert "base.parameters in" in machine.enter("student_update")
    assert "base.parameters out" not in machine.enter("synchronise")
    assert "base.parameters out" not in machine.enter("rollout") and base[0].numel() == 0
    for state in ("discriminator", "reference", "student", "rest"):
        machine.enter(state)
        assert base[0].tolist() == list(range(16)) and base[1].tolist() == [0, 1, 2, 3]
