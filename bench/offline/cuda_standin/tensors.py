"""Which tensors lie on the stand-in's GPU: in truth all of them lie in the host's memory.

A tensor is on the GPU where its storage is: what is made there by name, what is moved there, and what an operation
makes of tensors that are. What it assumes of torch, and checks:
- an operation takes tensors of one device, but for copies between devices, indices on the host, and single numbers of
  the host beside tensors of the GPU (TensorIterator.cpp, "Expected all tensors to be on the same device");
- numpy() and Triton's kernels take tensors of their own side alone;
- the ops of gadcore that were written for a CPU (torch.ops.gadcore.cpu_*) take none of the GPU's;
- a copy between devices that does not block runs later (streams.py); reading one number waits for everything.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext, _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from bench.offline.cuda_standin import streams
from bench.offline.cuda_standin.allocator import Allocator, Block
from bench.offline.cuda_standin.streams import Work

CUDA = torch.device("cuda", 0)
_FACTORIES = (
    "arange", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randn",
    "randperm", "scalar_tensor", "tensor", "zeros",
)  # fmt: skip
_LIKE = ("as_tensor", "asarray", "empty_like", "full_like", "ones_like", "rand_like", "randint_like", "randn_like",
         "zeros_like")  # fmt: skip
_NEW = ("new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros")
_aten = torch.ops.aten
# Of two devices on purpose.
_ACROSS = {_aten.copy_, _aten._to_copy, _aten.set_, _aten.lift_fresh}
_INDEXED = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_, _aten._unsafe_index}
# Take the host's numbers for no tensor of theirs.
_STRICT = {_aten.cat, _aten.stack}


class Tensors:
    """The storages that are on the GPU, and the patches of torch that make it so."""

    def __init__(self, allocator: Allocator) -> None:
        self.allocator = allocator
        self._blocks: dict[int, Block] = {}
        self._pinned: set[int] = set()
        # Page-locked bytes of the host as torch's allocator takes them: CachingHostAllocator.h rounds to powers of two.
        self.pinned_bytes = 0
        # Reads of single numbers, for which the host waits.
        self.reads = 0
        self._real = 0
        self._to_host = 0

    # Where a tensor is

    def on_gpu(self, tensor: Tensor) -> bool:
        storage = _storage(tensor)
        return storage is not None and storage._cdata in self._blocks

    def take(self, tensor: Tensor) -> Tensor:
        """Says that a tensor's storage is on the GPU, which takes memory there."""
        storage = _storage(tensor)
        if storage is not None and storage._cdata not in self._blocks and tensor.device.type != "meta":
            key = storage._cdata
            self._blocks[key] = self.allocator.allocate(storage.nbytes())
            weakref.finalize(storage, self._dropped, key)
        return tensor

    def _dropped(self, key: int) -> None:
        block = self._blocks.pop(key, None)
        if block is not None:
            self.allocator.release(block)

    def pin(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        size = 1 << max(0, storage.nbytes() - 1).bit_length()
        self._pinned.add(storage._cdata)
        self.pinned_bytes += size
        weakref.finalize(storage, self._unpinned, storage._cdata, size)
        return tensor

    def _unpinned(self, key: int, size: int) -> None:
        self._pinned.discard(key)
        self.pinned_bytes -= size

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._pinned

    @contextmanager
    def real(self) -> Iterator[None]:
        """Inside, every tensor says where it is in truth: for what stands for the GPU's own work."""
        self._real += 1
        try:
            with _disable_current_modes():
                yield
        finally:
            self._real -= 1

    @contextmanager
    def _onto_host(self) -> Iterator[None]:
        self._to_host += 1
        try:
            yield
        finally:
            self._to_host -= 1

    def moved(self, tensor: Tensor, gpu: bool, *, copy: bool = False) -> Tensor:
        """The tensor on the side that is asked for; gradients go through."""
        if self.on_gpu(tensor) == gpu and not copy:
            return tensor
        streams.current[0].run()
        return _Move.apply(tensor, self, gpu)  # type: ignore[no-any-return]

    # Patches

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Patches torch for the block."""
        changes: list[tuple[Any, str, Any]] = []
        # What `with torch.device(..)` acts on is looked up once in a process: torch's own functions, not these.
        _device_constructors()

        def put(owner: Any, name: str, value: Any) -> None:
            changes.append((owner, name, owner.__dict__.get(name, _MISSING)))
            setattr(owner, name, value)

        for name in _FACTORIES:
            put(torch, name, self._factory(getattr(torch, name)))
        for name in _LIKE:
            put(torch, name, self._factory(getattr(torch, name), like=True))
        for name in _NEW:
            put(torch.Tensor, name, self._factory(getattr(torch.Tensor, name), like=True))
        for name, method in self._methods().items():
            put(torch.Tensor, name, method)
        try:
            with _Dispatch(self):
                yield
        finally:
            for owner, name, value in reversed(changes):
                if value is _MISSING:
                    delattr(owner, name)
                else:
                    setattr(owner, name, value)

    def _factory(self, make: Callable[..., Tensor], *, like: bool = False) -> Callable[..., Tensor]:
        @functools.wraps(make)
        def made(*args: Any, **kwargs: Any) -> Tensor:
            device = kwargs.get("device")
            pinned = kwargs.pop("pin_memory", False)
            if self._real or (device is not None and torch.device(device).type not in ("cpu", "cuda")):
                return make(*args, **kwargs)
            source = args[0] if like and args and isinstance(args[0], Tensor) else None
            if source is None and device is None and _inside_cuda():
                device = CUDA
            gpu = source is not None and self.on_gpu(source) if device is None else torch.device(device).type == "cuda"
            if device is not None:
                kwargs["device"] = "cpu"
            with self._onto_host():
                out = make(*args, **kwargs)
            if source is not None and _storage(out) is _storage(source) and self.on_gpu(source) != gpu:
                return self.moved(out, gpu)
            if pinned:
                self.pin(out)
            return self.take(out) if gpu else out

        return made

    def _methods(self) -> dict[str, Any]:
        base = torch._C.TensorBase
        real_device, real_cuda, real_cpu = (base.__dict__[n].__get__ for n in ("device", "is_cuda", "is_cpu"))
        to, numpy, deepcopy = torch.Tensor.to, torch.Tensor.numpy, torch.Tensor.__deepcopy__

        def device(tensor: Tensor) -> torch.device:
            return CUDA if not self._real and self.on_gpu(tensor) else real_device(tensor)

        def move(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self._real:
                return to(tensor, *args, **kwargs)
            copy = kwargs.get("copy", False)
            if args and isinstance(args[0], Tensor):
                target, dtype = args[0].device, args[0].dtype
            else:
                target, dtype, _, layout = torch._C._nn._parse_to(
                    *args, **{k: v for k, v in kwargs.items() if k not in ("copy", "memory_format")}
                )
            if target is not None and target.type not in ("cpu", "cuda"):
                return to(tensor, *args, **kwargs)
            out = tensor if target is None else self.moved(tensor, target.type == "cuda", copy=copy and dtype is None)
            return out if dtype is None else to(out, dtype, copy=copy and out is tensor)

        def as_numpy(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not self._real and self.on_gpu(tensor):
                raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
            return numpy(tensor, *args, **kwargs)

        def copied(tensor: Tensor, memo: Any) -> Tensor:
            out = deepcopy(tensor, memo)
            return self.take(out) if not self._real and self.on_gpu(tensor) else out

        def record_stream(tensor: Tensor, stream: streams.Stream) -> None:
            stream.keep(tensor.untyped_storage())

        return {
            "device": property(device),
            "is_cuda": property(lambda t: not self._real and self.on_gpu(t) or real_cuda(t)),
            "is_cpu": property(lambda t: real_cpu(t) and (bool(self._real) or not self.on_gpu(t))),
            "get_device": lambda t: 0 if not self._real and self.on_gpu(t) else -1,
            "to": move,
            "cuda": lambda t, *_, **__: move(t, "cuda"),
            "cpu": lambda t, *_, **__: move(t, "cpu"),
            "numpy": as_numpy,
            "pin_memory": lambda t, *_: self.pin(self.moved(t, False, copy=True)),
            "is_pinned": lambda t, *_: self.is_pinned(t),
            "record_stream": record_stream,
            "__deepcopy__": copied,
        }


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, tensors: Tensors, gpu: bool) -> Tensor:
        ctx.tensors, ctx.back = tensors, tensors.on_gpu(tensor)
        with tensors._onto_host():
            out = torch.Tensor.clone(tensor)
        return tensors.take(out) if gpu else out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.tensors.moved(grad, ctx.back), None, None


def _inside_cuda() -> bool:
    """Inside `with torch.device("cuda")`."""
    contexts = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, DeviceContext)]
    return bool(contexts) and contexts[-1].device.type == "cuda"


_MISSING: Any = object()


def _storage(tensor: Tensor) -> Any:
    try:
        return torch._C.TensorBase.untyped_storage(tensor)
    except (NotImplementedError, RuntimeError):
        # A wrapper, which has none of its own.
        return None


def _mm(a: Tensor, b: Tensor, dtype: torch.dtype, *, out: Tensor) -> Tensor:
    return out.copy_(a.to(dtype) @ b.to(dtype))


def _addmm(
    added: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, *, beta: float = 1, alpha: float = 1, out: Tensor
) -> Tensor:
    product = alpha * (a.to(dtype) @ b.to(dtype))
    return out.copy_(product + beta * added if beta else product)


# native_functions.yaml: products of 16 bits that are added up, and handed out, in float32.
_ONLY_ON_CUDA = {_aten.mm.dtype_out: _mm, _aten.addmm.dtype_out: _addmm}


class _Dispatch(TorchDispatchMode):
    """What operations make of tensors on the GPU lies on the GPU."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__()
        self.tensors = tensors

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [self.tensors.on_gpu(tensor) for tensor in given]
        packet = func.overloadpacket
        if not any(there):
            return self._of_autograd(func, given, func(*args, **kwargs))
        self._check(func, packet, given, there)
        if packet is _aten._local_scalar_dense:
            self.tensors.reads += 1
            streams.current[0].run()
        if (
            packet is _aten.copy_
            and len(set(there[:2])) == 2
            and (kwargs.get("non_blocking") or len(args) > 2 and args[2])
        ):
            return self._copy_later(*given[:2])
        out = self._run(func, args, kwargs)
        if not self.tensors._to_host:
            # What an operation hands back of its arguments stays where it is.
            own = {id(_storage(tensor)) for tensor in given}
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor) and id(_storage(leaf)) not in own:
                    self.tensors.take(leaf)
        return out

    def _of_autograd(self, func: Any, given: list[Tensor], out: Any) -> Any:
        """Zeros that the engine makes, on the graph's device, for a result that nobody has read."""
        made = not given and not self.tensors._to_host and torch._C._current_graph_task_id() != -1
        return self.tensors.take(out) if made and isinstance(out, Tensor) else out

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func in _ONLY_ON_CUDA:
            return _ONLY_ON_CUDA[func](*args, **kwargs)
        op = OPDEFS.get(func._schema.name)
        if op is None:
            return func(*args, **kwargs)
        # Python of gadcore's own: what it does inside is seen as well.
        with self:
            return op._init_fn(*args, **kwargs)

    def _check(self, func: Any, packet: Any, given: list[Tensor], there: list[bool]) -> None:
        if func._schema.name.startswith("gadcore::cpu_"):
            raise RuntimeError(f"{func._schema.name} is made for a CPU and got a tensor on cuda:0")
        if all(there) or packet in _ACROSS:
            return
        if packet in _INDEXED and there[0]:
            return
        numbers = [not gpu and tensor.dim() == 0 for tensor, gpu in zip(given, there, strict=True)]
        if packet in _STRICT or not all(gpu or number for gpu, number in zip(there, numbers, strict=True)):
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                f"({func})"
            )

    def _copy_later(self, target: Tensor, source: Tensor) -> Tensor:
        stream = streams.current[-1]
        default = stream is streams.current[0]
        if default and self.tensors.on_gpu(target):
            return target.copy_(source)
        # In its place among the default stream's other work, which has run already; the host sees it later.
        given = [target, source.clone() if default else source]
        uses = [tensor.untyped_storage() for tensor in given]
        stream.submit(Work("a copy between devices", _copying(*given, keep=default), uses[: 1 if default else 2]))
        return target


def _copying(target: Tensor, source: Tensor, *, keep: bool) -> Callable[[], None]:
    """The copy, which holds neither tensor's memory: CUDA would not. keep: but the source's, which is its own."""
    places = [(t.untyped_storage(), t.dtype, t.size(), t.stride(), t.storage_offset()) for t in (target, source)]
    storages = [weakref.ref(places[0][0]), places[1][0] if keep else weakref.ref(places[1][0])]
    layouts = [place[1:] for place in places]

    def run() -> None:
        views = []
        for storage, (dtype, size, stride, offset) in zip(storages, layouts, strict=True):
            found = storage() if isinstance(storage, weakref.ref) else storage
            views.append(torch.empty(0, dtype=dtype).set_(found, offset, size, stride))
        views[0].copy_(views[1])

    return run
