"""The stand-in for a GPU does what it says it assumes of one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.support.importable import make_bench_importable

make_bench_importable()

from bench.offline.cuda_standin import gpu  # noqa: E402
from bench.offline.cuda_standin.allocator import MIB, Allocator  # noqa: E402
from bench.offline.cuda_standin.streams import FreedInFlight  # noqa: E402


def test_tensors_are_where_they_were_made_or_moved() -> None:
    with gpu(64 * MIB):
        host, there = torch.zeros(3, 4), torch.zeros(3, 4, device="cuda")
        assert (host.device.type, there.device.type, there.is_cuda, there.is_cpu) == ("cpu", "cuda", True, False)
        for made in (
            there + 1,
            there[1:],
            there.T,
            there.new_ones(2),
            torch.empty_like(there),
            torch.cat([there, there]),
        ):
            assert made.is_cuda
        assert (
            not torch.zeros_like(there, device="cpu").is_cuda and not there.cpu().is_cuda and there.cpu() is not there
        )
        assert host.to("cuda").is_cuda and host.to(there).is_cuda and not host.is_cuda and host.to("cpu") is host
        assert host.to("cuda", torch.bfloat16).dtype == torch.bfloat16
        layer = nn.Linear(4, 2).to("cuda")
        layer(there).sum().backward()
        assert copy.deepcopy(layer).weight.is_cuda and layer.weight.grad.is_cuda
        with pytest.raises(TypeError, match="can't convert cuda:0"):
            there.numpy()
    assert not torch.cuda.is_available() and not there.is_cuda


def test_a_gradient_goes_back_to_the_device_that_it_came_from() -> None:
    with gpu(64 * MIB):
        host = torch.ones(3, requires_grad=True)
        (host.to("cuda") * 2).sum().backward()
        assert not host.grad.is_cuda and torch.equal(host.grad, torch.full((3,), 2.0))


def test_two_devices_do_not_mix() -> None:
    with gpu(64 * MIB):
        host, there = torch.ones(3), torch.ones(3, device="cuda")
        for wrong in (
            lambda: host + there,
            lambda: torch.cat([host, there]),
            lambda: there[:, None] @ host[None],
            lambda: host[there.long()],
            lambda: host + there.sum(),
        ):
            with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
                wrong()
        # A number of the host, and indices of the host into a tensor of the GPU.
        assert (there + host.sum()).is_cuda and there[host.long().clamp(max=2)].is_cuda
        host.copy_(there)
        assert not host.is_cuda


def test_memory_is_taken_as_by_the_caching_allocator() -> None:
    memory = Allocator(100 * MIB, context=10 * MIB)
    small = memory.allocate(1)
    assert (small.size, memory.reserved, memory.free) == (512, 2 * MIB, 88 * MIB)
    middle = memory.allocate(3 * MIB)
    assert memory.reserved == 22 * MIB and middle.size == 3 * MIB
    # What is left of the second segment is too small.
    large = memory.allocate(17 * MIB + 1)
    assert memory.reserved == 40 * MIB and large.size == 18 * MIB
    memory.release(middle)
    memory.release(large)
    # The cache holds it: nobody else can have it before it is given back.
    assert memory.allocated == 512 and memory.free == 50 * MIB
    # The smallest block that fits.
    assert memory.allocate(5 * MIB).segment is large.segment
    with pytest.raises(torch.OutOfMemoryError, match="vLLM asks for 73400320 bytes, 52428800 are free"):
        memory.take_beside("vLLM", 70 * MIB)
    memory.empty_cache()
    memory.take_beside("vLLM", 70 * MIB)
    assert memory.most_reserved == 40 * MIB and memory.most_allocated == 512 + 21 * MIB


def test_an_allocation_gives_back_the_cache_before_it_fails() -> None:
    memory = Allocator(40 * MIB)
    first = memory.allocate(24 * MIB)
    memory.release(first)
    second = memory.allocate(36 * MIB)
    with pytest.raises(torch.OutOfMemoryError, match="tried to allocate 8388608 bytes: 4194304 of 41943040 are free"):
        memory.allocate(8 * MIB)
    memory.release(second)
    memory.allocate(8 * MIB)


def test_freed_neighbours_become_one_block() -> None:
    memory = Allocator(64 * MIB)
    blocks = [memory.allocate(4 * MIB) for _ in range(5)]
    assert memory.reserved == 20 * MIB
    for block in (blocks[1], blocks[3], blocks[2]):
        memory.release(block)
    again = memory.allocate(9 * MIB)
    assert memory.reserved == 20 * MIB and again.start == 4 * MIB


def test_tensors_take_memory_and_give_it_back() -> None:
    with gpu(8 * MIB) as device:
        tensor = torch.zeros(1 << 18, device="cuda")
        assert torch.cuda.memory_allocated() == MIB and torch.cuda.mem_get_info() == (6 * MIB, 8 * MIB)
        view = tensor[5:]
        del tensor
        assert torch.cuda.memory_allocated() == MIB
        del view
        assert torch.cuda.memory_allocated() == 0 and torch.cuda.memory_reserved() == 2 * MIB
        torch.cuda.empty_cache()
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(9 * MIB, dtype=torch.uint8, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        a = torch.ones(1000, device="cuda")
        a = a * 2 + 1
        assert torch.cuda.max_memory_allocated() == 3 * 4096 and device.allocator.allocated == 4096


def test_page_locked_blocks_are_rounded_up() -> None:
    with gpu(8 * MIB) as device:
        host = torch.empty(5000, dtype=torch.uint8, pin_memory=True)
        assert host.is_pinned() and device.pinned_bytes == 8192
        assert not torch.empty(3).is_pinned() and torch.ones(3).pin_memory().is_pinned()
        del host
        assert device.pinned_bytes == 0
        assert torch.cuda.cudart().cudaHostRegister(4096, 5000, 0) == 0 and device.pinned_bytes == 5000
        with pytest.raises(RuntimeError, match="712"):
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(4096, 5000, 0))
        assert torch.cuda.cudart().cudaHostUnregister(4096) == 0 and device.pinned_bytes == 0


def test_a_copy_that_nobody_waits_for_has_not_happened() -> None:
    with gpu(8 * MIB):
        there, host = torch.ones(4, device="cuda"), torch.zeros(4)
        host.copy_(there, non_blocking=True)
        there.add_(1)
        assert torch.equal(host, torch.zeros(4))
        torch.cuda.synchronize()
        # As it was in its place in the stream.
        assert torch.equal(host, torch.ones(4))


def test_streams_run_when_somebody_waits() -> None:
    with gpu(8 * MIB):
        stream, event = torch.cuda.Stream(), torch.cuda.Event()
        host, there, other = torch.ones(4), torch.zeros(4, device="cuda"), torch.zeros(4, device="cuda")
        with torch.cuda.stream(stream):
            there.copy_(host, non_blocking=True)
            event.record(stream)
            other.copy_(host, non_blocking=True)
        assert not there.any() and not stream.query() and not event.query()
        torch.cuda.current_stream().wait_event(event)
        assert there.all() and not other.any() and event.query()
        torch.cuda.current_stream().wait_stream(stream)
        assert other.all() and stream.query()


def test_memory_that_a_copy_needs_must_not_be_freed() -> None:
    with gpu(8 * MIB):
        for recorded in (False, True):
            stream, host = torch.cuda.Stream(), torch.ones(4)
            there = torch.zeros(4, device="cuda")
            with torch.cuda.stream(stream):
                there.copy_(host, non_blocking=True)
            if recorded:
                there.record_stream(stream)
            del there
            if recorded:
                stream.synchronize()
            else:
                with pytest.raises(FreedInFlight):
                    stream.synchronize()


def test_autocast_is_cudas() -> None:
    with gpu(8 * MIB):
        x, layer = torch.ones(2, 4, device="cuda"), nn.Linear(4, 4).to("cuda")
        assert not torch.is_autocast_enabled("cuda")
        with torch.autocast("cuda", dtype=torch.bfloat16):
            assert torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") == torch.bfloat16
            out = layer(x)
            assert (out.dtype, out.sum().dtype, out.softmax(-1).dtype) == (torch.bfloat16, torch.float32, torch.float32)
            assert nn.functional.silu(out).dtype == torch.bfloat16
            with torch.autocast("cuda", enabled=False):
                assert layer(x).dtype == torch.float32


def test_the_host_waits_for_every_number_that_it_reads() -> None:
    with gpu(8 * MIB) as device:
        x = torch.ones(4, device="cuda")
        assert x.sum().item() == 4 and bool(x.any()) and device.reads == 2
