"""Checks of the memory pool of CPU tensors; tests/unit/cpu/test_pool.py runs them in a process of their own."""

from __future__ import annotations

import random
import threading

import pytest
import torch

from gadcore.cpu import pool
from gadcore.kernels.cpu import native
from gadcore.memory import resident

MIB = 1 << 20

pytestmark = pytest.mark.skipif(
    not native.available("_cpu_pool_install"), reason="the native library is not built for this machine"
)


@pytest.fixture(autouse=True)
def installed() -> None:
    if not pool.install():
        pytest.skip("this system has no pool")
    pool.release()


def block(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8)


def test_sizes_outside_its_own_are_mallocs() -> None:
    before = pool.sizes().in_use
    kept = [block(64 * 1024 - 1), block(64 * MIB + 1)]
    assert pool.sizes().in_use == before
    kept += [block(64 * 1024), block(64 * MIB)]
    assert pool.sizes().in_use - before == 64 * 1024 + 64 * MIB
    kept.clear()
    assert pool.sizes().in_use == before


def test_a_freed_hole_is_filled_exactly_and_neighbours_merge() -> None:
    before = pool.sizes().in_use
    blocks = [block(3 * MIB) for _ in range(6)]
    held, middle = pool.sizes().held, blocks[2].data_ptr()
    del blocks[2]
    again = block(3 * MIB)
    assert again.data_ptr() == middle
    del again
    # Two neighbours make room for one of their common size; freed in both orders.
    pair = sorted(blocks[2:4], key=torch.Tensor.data_ptr)
    del blocks[2:4]
    first = pair[0].data_ptr()
    while pair:
        pair.pop()
    merged = block(6 * MIB)
    assert merged.data_ptr() in (first, middle) and pool.sizes().held == held
    del merged, blocks
    assert pool.sizes().in_use == before


def test_tensors_never_overlap_and_keep_their_values() -> None:
    rng, held = random.Random(0), {}
    for i in range(2000):
        if held and rng.random() < 0.5:
            value, tensor = held.popitem() if rng.random() < 0.5 else (key := rng.choice(list(held)), held.pop(key))
            assert bool((tensor == value).all()), f"tensor {value} was written by another one"
        held[i] = torch.full((rng.randrange(16 * 1024, 512 * 1024),), i, dtype=torch.int32)
        if len(held) > 40:
            held.pop(next(iter(held)))
    assert all(bool((tensor == value).all()) for value, tensor in held.items())


def test_release_returns_what_is_free_and_nothing_else() -> None:
    blocks = [torch.ones(4 * MIB, dtype=torch.uint8) for _ in range(32)]
    del blocks[::2]
    before = resident.rss()
    pool.release()
    assert before - resident.rss() > 48 * MIB, "16 blocks of 4 MiB were freed"
    assert all(bool(b.all()) for b in blocks)


def with_holes(size: int) -> list[torch.Tensor]:
    """Blocks of `size` with holes of `size` between them, 96 MiB of each."""
    blocks = [torch.ones(size, dtype=torch.uint8) for _ in range(2 * 96 * MIB // size)]
    del blocks[::2]
    return blocks


@pytest.mark.parametrize("more", [65 * MIB, 8 * MIB], ids=["a tensor of malloc's", "a longer reach"])
def test_holes_are_given_back_before_more_is_taken(more) -> None:
    blocks = with_holes(6 * MIB)
    before = resident.rss()
    # Does not fit into the holes, and its pages are not written to.
    kept = block(more)
    assert before - resident.rss() > 48 * MIB
    assert all(bool(b.all()) for b in blocks) and kept.numel() == more


@pytest.mark.parametrize("more", [65 * MIB, 8 * MIB], ids=["a tensor of malloc's", "a longer reach"])
def test_holes_stay_while_less_is_held_than_there_once_was(more) -> None:
    blocks = with_holes(6 * MIB)
    most = [torch.ones(6 * MIB, dtype=torch.uint8) for _ in range(48)]
    # Gives their holes back, so that there is room below the most.
    most.clear()
    block(65 * MIB)
    blocks += with_holes(6 * MIB)
    before = resident.rss()
    kept = block(more)
    assert resident.rss() > before - MIB
    assert all(bool(b.all()) for b in blocks) and kept.numel() == more


def test_what_fits_into_a_hole_gives_nothing_back() -> None:
    blocks = with_holes(6 * MIB)
    before = resident.rss()
    kept = block(5 * MIB)
    assert resident.rss() > before - MIB and len(blocks) and kept.numel() == 5 * MIB


def test_threads_allocate_and_free_at_once() -> None:
    before, wrong = pool.sizes().in_use, []

    def work(value: int) -> None:
        for size in range(1, 60):
            tensor = torch.full((size * 32 * 1024,), value, dtype=torch.uint8)
            if size * 32 * 1024 != int((tensor == value).sum()):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and pool.sizes().in_use == before


def test_a_tensor_from_before_may_be_freed_after_and_resized() -> None:
    tensor = torch.from_numpy(torch.arange(1 << 20).numpy().copy())
    shared = block(MIB)
    shared.resize_(8 * MIB)
    assert shared.numel() == 8 * MIB and int(tensor[-1]) == (1 << 20) - 1
