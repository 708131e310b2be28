"""The emulator of csrc/cuda/simt.h: what it finds that a GPU would not survive, and in which order it runs."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from gadcore.kernels.cast_copy import copy_table
from gadcore.kernels.cuda.cast_copy import launch
from tests.support import cuda_emulation

if reason := cuda_emulation.why_not():
    pytest.skip(reason, allow_module_level=True)

BROKEN = r"""
#include "device.cuh"

__global__ void misaligned(float* x) { gadcore::store(x, gadcore::load<4>(x + 1)); }
__global__ void block_order(float* x) { *x = blockIdx.x; }
__global__ void thread_order(float* x) { *x = threadIdx.x; }

GADCORE_EXPORT int run(int which, float* x) {
  switch (which) {
    case 0: GADCORE_LAUNCH((misaligned), 1, 1, nullptr, x); break;
    case 1: GADCORE_LAUNCH((block_order), 9, 1, nullptr, x); break;
    case 2: GADCORE_LAUNCH((thread_order), 1, 64, nullptr, x); break;
  }
  return cudaGetLastError();
}
GADCORE_EXPORT void set_seed(uint64_t seed) { simt::seed = seed; }
"""


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("broken")
    (folder / "broken.cu").write_text(BROKEN)
    cuda_emulation.build_module().compile_emulated([folder / "broken.cu"], folder / "broken.so")
    library = ctypes.CDLL(str(folder / "broken.so"))
    library.run.argtypes = [ctypes.c_int, ctypes.c_void_p]
    library.set_seed.argtypes = [ctypes.c_uint64]
    return library


def test_a_misaligned_access_ends_the_launch(broken: ctypes.CDLL) -> None:
    x = torch.zeros(64)
    assert broken.run(0, x.data_ptr()) == 716
    assert broken.run(1, x.data_ptr()) == 0, "an error ends with the launch that made it"


def test_the_seed_changes_the_order_of_blocks_and_threads(broken: ctypes.CDLL) -> None:
    def results(kernel: int) -> list[Tensor]:
        found = []
        for seed in range(5):
            broken.set_seed(seed)
            x = torch.zeros(64)
            assert broken.run(kernel, x.data_ptr()) == 0
            found.append(x)
        return found

    for kernel in (1, 2):
        first, *others = results(kernel)
        assert any(not torch.equal(first, other) for other in others)


def test_a_failed_launch_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    library = cuda_emulation.library()
    monkeypatch.setitem(library._functions, "cast_copy", lambda *_: 716)
    with pytest.raises(RuntimeError, match=r"cast_copy could not be launched: misaligned address \(error 716\)"):
        launch(library, copy_table([(torch.zeros(3), torch.zeros(3))]))
