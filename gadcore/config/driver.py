"""What the NVIDIA driver says of itself and of the machine's GPUs, through NVML, whatever torch sees of them."""

from __future__ import annotations

import os
from dataclasses import dataclass

# The oldest driver that runs a major version of CUDA.
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}


class DriverUnknown(Exception):
    """The driver cannot be asked; the message says why."""


@dataclass(frozen=True)
class Gpu:
    """name: the vendor's. memory, free: in bytes, 0 where NVML does not tell. capability: as (9, 0)."""

    name: str
    memory: int
    free: int
    capability: tuple[int, int]

    def __str__(self) -> str:
        major, minor = self.capability
        memory = f"{self.free / 1e9:.0f} of {self.memory / 1e9:.0f} GB free" if self.memory else "memory not told"
        return f"{self.name}, sm_{major}{minor}, {memory}"


@dataclass(frozen=True)
class Driver:
    """version: of the driver, as "580.65.06". cuda: the newest CUDA that it was made for. gpus: the machine's."""

    version: str
    cuda: tuple[int, int]
    gpus: tuple[Gpu, ...]

    def __str__(self) -> str:
        return f"{self.version}, made for CUDA up to {self.cuda[0]}.{self.cuda[1]}"

    def runs(self, cuda: str) -> bool:
        """Whether it runs what is built for this version of CUDA, as "13.0": newer minor versions run too."""
        return self.cuda[0] >= int(cuda.split(".")[0])


def read_driver() -> Driver | None:
    """None where there is no NVIDIA driver. Raises DriverUnknown where nvidia-ml-py is missing, or NVML fails."""
    try:
        import pynvml
    except ImportError as error:
        raise DriverUnknown("the package nvidia-ml-py is not installed") from error
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError_LibraryNotFound:
        return None
    except pynvml.NVMLError as error:
        raise DriverUnknown(f"NVML: {error}") from error
    try:
        version, number = pynvml.nvmlSystemGetDriverVersion(), pynvml.nvmlSystemGetCudaDriverVersion_v2()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return Driver(str(version), (number // 1000, number % 1000 // 10), tuple(map(_gpu, handles)))
    except pynvml.NVMLError as error:
        raise DriverUnknown(f"NVML: {error}") from error
    finally:
        pynvml.nvmlShutdown()


def find_driver() -> Driver | None:
    """None where there is no NVIDIA driver, and where it cannot be asked."""
    try:
        return read_driver()
    except DriverUnknown:
        return None


def _gpu(handle: object) -> Gpu:
    import pynvml

    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        total, free = int(memory.total), int(memory.free)
    except pynvml.NVMLError_NotSupported:
        # Where GPU and CPU have one memory.
        total = free = 0
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    return Gpu(str(pynvml.nvmlDeviceGetName(handle)), total, free, (major, minor))


def hidden_on_purpose() -> bool:
    """Whether CUDA_VISIBLE_DEVICES leaves out every GPU: by nothing, or by a first number that no GPU has."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible is not None and (not visible.strip() or visible.strip().startswith(("-", "NoDevFiles")))


def why_unseen(driver: Driver, torch_version: str, torch_cuda: str | None) -> str:
    """Why torch, built for `torch_cuda` (None: for no CUDA), sees none of the driver's GPUs, and what mends it."""
    names = ", ".join(gpu.name for gpu in driver.gpus)
    seen = f"the driver {driver}, has {len(driver.gpus)} GPU{'s' * (len(driver.gpus) != 1)} ({names})"
    if torch_cuda is None:
        return (
            f"{seen}, and torch {torch_version} is a build without CUDA: install the CUDA stack "
            "(make setup GADCORE_STACK=cuda)"
        )
    if not driver.runs(torch_cuda):
        oldest = OLDEST_DRIVER.get(int(torch_cuda.split(".")[0]))
        newer = f"of version {oldest} or newer" if oldest else f"that runs CUDA {torch_cuda}"
        return (
            f"{seen}, and torch {torch_version}, a build for CUDA {torch_cuda}, can use none of them: install a driver "
            f"{newer}"
        )
    return (
        f"{seen}, and torch {torch_version}, a build for CUDA {torch_cuda}, sees none of them: "
        "`python -c 'import torch; torch.cuda.init()'` says why"
    )
