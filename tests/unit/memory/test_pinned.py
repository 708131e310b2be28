"""Page-locked memory and its stream: nothing is freed, unlocked or read before a copy is done."""

from __future__ import annotations

import pytest
import torch

from gadcore.errors import UserError
from gadcore.memory.arena import Arena
from gadcore.memory.tiers import PinnedTier
from tests.support.cuda_streams import FakeCuda

CPU = torch.device("cpu")


@pytest.fixture
def cuda(monkeypatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


def pinned(size: int) -> PinnedTier:
    return PinnedTier(CPU, "student.parameters", size)


def test_host_memory_is_as_large_as_its_holding(cuda) -> None:
    """torch's own page-locked memory would take 128 KiB here, and 64 GiB where 33 are needed."""
    size = (64 << 10) + 64
    tier = pinned(size)
    assert list(cuda.locked.values()) == [size]
    assert tier.readable().nbytes == size
    tier.close()
    assert not cuda.locked


def test_what_cannot_be_locked_is_told_with_what_to_do(cuda) -> None:
    cuda.fails = 2
    with pytest.raises(
        UserError, match=r"cannot lock 1 MiB .*student.parameters: out of memory \(2\); .*offload to none"
    ):
        pinned(1 << 20)
    assert not cuda.locked
    with pytest.raises(UserError, match="cannot lock .* MiB of host memory"):
        pinned(1 << 60)


def test_values_survive_moves_ahead_and_at_once(cuda) -> None:
    held = [torch.arange(1000.0), torch.arange(7, dtype=torch.int16)]
    before = [t.clone() for t in held]
    arena = Arena("student.parameters", held, pinned)
    for ahead in (True, False, True):
        if ahead:
            arena.come_soon()
            assert cuda.streams[0].pending, "the device may compute meanwhile"
        arena.come()
        assert all(torch.equal(t, b) for t, b in zip(held, before, strict=True))
        for tensor, expected in zip(held, before, strict=True):
            tensor.add_(1)
            expected.add_(1)
        arena.changed()
        arena.leave()
        assert not cuda.streams[0].pending, "the buffer is freed: its copy must be done"
    assert all(torch.equal(v, b) for (_, v), b in zip(arena.readable(), before, strict=True))
    assert len(cuda.recorded) == 3, "a buffer that is freed while its copy writes is nobody's until then"


def test_a_load_that_is_given_back_is_waited_for(cuda) -> None:
    held = [torch.arange(1000.0)]
    arena = Arena("student.parameters", held, pinned)
    arena.come_soon()
    assert arena.device_bytes and cuda.streams[0].pending
    arena.not_yet()
    assert not cuda.streams[0].pending and not arena.device_bytes and not arena.resident
    arena.not_yet()
    arena.come()
    assert torch.equal(held[0], torch.arange(1000.0))


def test_closing_waits_for_a_load(cuda) -> None:
    for started in (False, True):
        arena = Arena("student.parameters", [torch.arange(1000.0)], pinned)
        if started:
            arena.come_soon()
        # What has come is on its way too: load() lets the device wait, not the host.
        else:
            arena.tier.start_load(torch.empty(arena.bytes, dtype=torch.uint8))
        arena.close()
        assert not cuda.locked
