"""Triton's interpreter with numbers like a GPU's, and hooks on everything that a kernel touches.

Import this before any module that defines a kernel, in a process started with TRITON_INTERPRET=1 and
OPENBLAS_NUM_THREADS=1 (with more threads numpy's small matrix products take hundreds of times longer).

What the interpreter of Triton 3.7 computes differently from a GPU, and is mended here:
- bfloat16 lives in uint16 arrays. Arithmetic, comparisons, reductions and `tl.dot` worked on the bit patterns, and
  float32 was cut off rather than rounded. Here it is widened to float32, computed, and rounded to the nearest even.
- `tl.dot` on float32 was exact. Where the kernel asks for TF32 (the default), the operands are rounded to TF32 here.
- `tl.maximum` and `tl.minimum` handed NaN on. Unless asked to, a GPU returns the operand that is a number.
- A float argument stayed Python's. A GPU's kernel gets a number of float32, with methods and a dtype.
- libdevice functions were missing. The common ones are numpy's here.
- Programs ran with the last grid axis fastest. A GPU launches them with the first axis fastest: so does this, and any
  other order can be set by `program_order`.

Not modelled: ex2.approx and the other approximate instructions, flushing of denormals, the order of sums inside a dot
or a reduction (numpy's here), and anything that depends on programs running at the same time: they run one by one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

if os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("bench.offline.interpreter needs a process started with TRITON_INTERPRET=1")
if os.environ.get("OPENBLAS_NUM_THREADS") != "1":
    if "numpy" in sys.modules:
        raise RuntimeError("bench.offline.interpreter needs a process started with OPENBLAS_NUM_THREADS=1")
    os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as triton_interpreter
from triton.language.extra import libdevice
from triton.language.extra.cuda import libdevice as cuda_libdevice
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle
from triton.runtime.jit import JITFunction, KernelInterface

from bench.offline.numerics import LIBDEVICE, bf16_to_f32, f32_to_bf16, round_to_tf32

Kind = Literal["load", "store", "atomic"]


def _refuse_kernels_defined_before() -> None:
    """A kernel module binds libdevice functions when it is imported, and is compiled where interpreting was off."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("triton", "torch"):
            if name == "triton.language.standard" and isinstance(vars(module).get("sum"), JITFunction):
                raise RuntimeError("triton was imported before TRITON_INTERPRET=1 was set")
            continue
        for attribute, value in list(getattr(module, "__dict__", {}).items()):
            if not isinstance(value, KernelInterface):
                continue
            function: Any = value
            while isinstance(function, KernelInterface):  # autotune, heuristics
                function = function.fn
            if function.__module__.partition(".")[0] not in ("triton", "torch"):
                raise RuntimeError(f"{name}.{attribute} is a kernel: import bench.offline.interpreter before {name}")


# --- hooks: what the meter and the guard listen to -------------------------------------------------------------------


class ObserverError(Exception):
    """Raised by an observer out of a launch, and passed on as it is instead of as an InterpreterError."""


class Observer:
    """Sees every launch while it is attached. Each method does nothing unless overridden."""

    def launch(self, kernel: str, grid: tuple[int, int, int], tensors: list[torch.Tensor]) -> None:
        """A launch begins; `tensors` are its pointer arguments."""

    def program(self, index: int) -> None:
        """The next accesses are those of this program; index counts with the first grid axis fastest."""

    def access(self, kind: Kind, addresses: np.ndarray, itemsize: int) -> None:
        """One tile operation: byte addresses (uint64, flat, in tile order) of the lanes that are not masked off."""

    def dot(self, rows: int, columns: int, depth: int) -> None:
        """One `tl.dot` (or a batch of them, counted in rows)."""

    def finished(self) -> None:
        """The launch has ended without an exception."""


def _launch_order(programs: int) -> np.ndarray:
    return np.arange(programs)


class _State:
    observers: list[Observer] = []
    order: Callable[[int], np.ndarray] = _launch_order
    poison_masked = False
    addresses_only = False
    # Of the launch that runs now.
    kernel = ""
    tensors: list[torch.Tensor] = []
    sequence: np.ndarray = np.arange(0)
    position = 0
    patched: set[int] = set()


@contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Attaches an observer to every launch in the block."""
    _State.observers.append(observer)
    try:
        yield
    finally:
        _State.observers.remove(observer)


@contextmanager
def program_order(order: Callable[[int], np.ndarray]) -> Iterator[None]:
    """Runs the programs of every launch in the block as order(n) says: range(n) permuted, first axis fastest."""
    before, _State.order = _State.order, order
    try:
        yield
    finally:
        _State.order = before


@contextmanager
def shuffled(seed: int) -> Iterator[None]:
    """Runs the programs of every launch in the block in an order drawn from `seed`."""
    generator = np.random.default_rng(seed)
    with program_order(generator.permutation):
        yield


@contextmanager
def poisoned_lanes() -> Iterator[None]:
    """Masked-off lanes of a load without `other` read as NaN (integers: the largest): on a GPU they are undefined."""
    before, _State.poison_masked = _State.poison_masked, True
    try:
        yield
    finally:
        _State.poison_masked = before


@contextmanager
def addresses_only() -> Iterator[None]:
    """Floats load as 0 in the block and `tl.dot` gives back its accumulator: quick, where addresses alone count."""
    before, _State.addresses_only = _State.addresses_only, True
    try:
        yield
    finally:
        _State.addresses_only = before


# --- bfloat16 and TF32 -----------------------------------------------------------------------------------------------


def _is_bf16(handle: TensorHandle) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def _widened(handle: TensorHandle) -> np.ndarray:
    return bf16_to_f32(handle.data) if _is_bf16(handle) else handle.data


def _narrowed(values: np.ndarray) -> TensorHandle:
    if values.dtype == np.bool_:
        return TensorHandle(values, tl.int1)
    return TensorHandle(f32_to_bf16(values), tl.bfloat16)


class _HonestBuilder:
    """What replaces the methods of InterpreterBuilder, whose one instance is already built."""

    def cast_impl(self: Any, src: TensorHandle, dst_type: Any) -> TensorHandle:
        if src.dtype.scalar == dst_type.scalar or not (_is_bf16(src) or dst_type.scalar == tl.bfloat16):
            return _original["cast_impl"](self, src, dst_type)
        values = _widened(src)
        if dst_type.scalar == tl.bfloat16:
            return TensorHandle(f32_to_bf16(values.astype(np.float32)), tl.bfloat16)
        return TensorHandle(values.astype(triton_interpreter._get_np_dtype(dst_type)), dst_type.scalar)

    def get_bf16(self: Any, value: float) -> TensorHandle:
        return TensorHandle(f32_to_bf16(np.array([value], dtype=np.float32)), tl.bfloat16)

    def binary_op(self: Any, lhs: TensorHandle, rhs: TensorHandle, op: Any) -> TensorHandle:
        if not _is_bf16(lhs):
            return _original["binary_op"](self, lhs, rhs, op)
        return _narrowed(op(_widened(lhs), _widened(rhs)))

    def ternary_op(self: Any, lhs: TensorHandle, rhs: TensorHandle, other: TensorHandle, op: Any) -> TensorHandle:
        # tl.where moves bit patterns and is right as it is.
        if op is np.where or not _is_bf16(other):
            return _original["ternary_op"](self, lhs, rhs, other, op)
        return _narrowed(op(_widened(lhs), _widened(rhs), _widened(other)))

    def unary_op(self: Any, arg: TensorHandle, op: Any) -> TensorHandle:
        return _narrowed(op(_widened(arg))) if _is_bf16(arg) else _original["unary_op"](self, arg, op)

    def create_fma(self: Any, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        if not _is_bf16(z):
            return _original["create_fma"](self, x, y, z)
        return _narrowed(_widened(x) * _widened(y) + _widened(z))

    def create_maxnumf(self: Any, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        return self.binary_op(lhs, rhs, np.fmax)

    def create_minnumf(self: Any, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        return self.binary_op(lhs, rhs, np.fmin)

    def create_dot(
        self: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, precision: Any, imprecise: Any
    ) -> TensorHandle:
        rows, columns = a.data.size // a.data.shape[-1], b.data.shape[-1]
        for observer in _State.observers:
            observer.dot(rows, columns, a.data.shape[-1])
        if _State.addresses_only:
            return d

        def operand(handle: TensorHandle) -> TensorHandle:
            if _is_bf16(handle):
                return TensorHandle(bf16_to_f32(handle.data), tl.float32)
            if handle.dtype.scalar == tl.float32 and precision == triton_interpreter._ir.INPUT_PRECISION.TF32:
                return TensorHandle(round_to_tf32(handle.data), tl.float32)
            return handle

        return _original["create_dot"](self, operand(a), operand(b), d, precision, imprecise)

    # --- memory --------------------------------------------------------------------------------------------------

    def create_masked_load(
        self: Any,
        ptrs: TensorHandle,
        mask: Any,
        other: Any,
        cache_modifier: Any,
        eviction_policy: Any,
        is_volatile: Any,
    ) -> TensorHandle:
        if _State.observers:
            _report("load", ptrs, mask)
        if _State.addresses_only and ptrs.get_element_ty().is_floating():
            dtype = triton_interpreter._get_np_dtype(ptrs.get_element_ty())
            return TensorHandle(np.zeros(np.shape(ptrs.data), dtype), ptrs.get_element_ty())
        if other is None and _State.poison_masked:
            dtype = triton_interpreter._get_np_dtype(ptrs.get_element_ty())
            other = TensorHandle(_poison(np.shape(ptrs.data), dtype, ptrs.get_element_ty()), ptrs.get_element_ty())
        return _original["create_masked_load"](self, ptrs, mask, other, cache_modifier, eviction_policy, is_volatile)

    def create_masked_store(
        self: Any, ptrs: TensorHandle, value: Any, mask: Any, cache_modifier: Any, eviction_policy: Any
    ) -> Any:
        if _State.observers:
            _report("store", ptrs, mask)
        return _original["create_masked_store"](self, ptrs, value, mask, cache_modifier, eviction_policy)

    def create_atomic_rmw(
        self: Any, op: Any, ptr: TensorHandle, val: Any, mask: Any, sem: Any, scope: Any
    ) -> TensorHandle:
        if _is_bf16(val) and op != triton_interpreter._ir.ATOMIC_OP.XCHG:
            raise NotImplementedError("atomic arithmetic on bfloat16")
        if _State.observers:
            _report("atomic", ptr, mask)
        return _original["create_atomic_rmw"](self, op, ptr, val, mask, sem, scope)

    def create_atomic_cas(self: Any, ptr: TensorHandle, cmp: Any, val: Any, sem: Any, scope: Any) -> TensorHandle:
        if _State.observers:
            _report("atomic", ptr, None)
        return _original["create_atomic_cas"](self, ptr, cmp, val, sem, scope)

    # --- the order of programs -----------------------------------------------------------------------------------

    def set_grid_dim(self: Any, nx: int, ny: int, nz: int) -> None:
        _original["set_grid_dim"](self, nx, ny, nz)
        count = nx * ny * nz
        _State.sequence, _State.position = np.asarray(_State.order(count)), 0
        if not np.array_equal(np.sort(_State.sequence), np.arange(count)):
            raise ValueError(f"the program order is no permutation of {count} programs")
        for observer in _State.observers:
            observer.launch(_State.kernel, (nx, ny, nz), _State.tensors)

    def set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        index = int(_State.sequence[_State.position])
        _State.position += 1
        nx, ny, _ = self.grid_dim
        _original["set_grid_idx"](self, index % nx, index // nx % ny, index // (nx * ny))
        for observer in _State.observers:
            observer.program(index)


def _report(kind: Kind, ptrs: TensorHandle, mask: Any) -> None:
    # Block pointers and descriptors pass a bare array as the mask, tl.load a handle.
    shape = np.shape(ptrs.data)
    if mask is None:
        lanes = np.ravel(ptrs.data)
    else:
        active = np.asarray(mask.data)
        shape = np.broadcast_shapes(shape, active.shape)
        lanes = np.broadcast_to(ptrs.data, shape)[np.broadcast_to(active, shape)]
    itemsize = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
    for observer in _State.observers:
        observer.access(kind, lanes, itemsize)


def _poison(shape: tuple[int, ...], dtype: np.dtype, element: Any) -> np.ndarray:
    if element == tl.bfloat16:
        return np.full(shape, 0x7FC0, dtype)
    if dtype.kind == "f":
        return np.full(shape, np.nan, dtype)
    return np.full(shape, True if dtype.kind == "b" else np.iinfo(dtype).max, dtype)


# --- reductions and scans --------------------------------------------------------------------------------------------


def _honest_apply(original: Any) -> Any:
    def apply_impl(self: Any, inputs: Any) -> Any:
        if all(x.dtype != tl.bfloat16 for x in inputs):
            return original(self, inputs)
        wide = tuple(self.to_tensor(_widened(x.handle), tl.float32) if x.dtype == tl.bfloat16 else x for x in inputs)
        results = original(self, wide)
        results = list(results) if isinstance(results, (list, tuple)) else [results]
        for i, x in enumerate(inputs[: len(results)]):
            if x.dtype == tl.bfloat16:
                data = f32_to_bf16(results[i].handle.data)
                scalar = not results[i].type.is_block()
                results[i] = self.to_tensor(data[0] if scalar else data, tl.bfloat16)
        return results

    return apply_impl


# --- libdevice -------------------------------------------------------------------------------------------------------


def _elementwise(function: Callable[[np.ndarray], np.ndarray]) -> Callable[..., Any]:
    def call(x: Any, _semantic: Any = None) -> Any:
        if x.dtype not in (tl.float32, tl.float64):
            raise TypeError(f"libdevice functions take fp32 or fp64, not {x.dtype}")
        data = x.handle.data
        return tl.tensor(TensorHandle(function(data).astype(data.dtype), x.handle.dtype), x.type)

    return call


# --- launches --------------------------------------------------------------------------------------------------------


def _pointers(arguments: Any) -> Iterator[torch.Tensor]:
    for argument in arguments:
        # TensorDescriptor and TensorWrapper both keep their tensor in `base`.
        tensor = getattr(argument, "base", None) if not isinstance(argument, torch.Tensor) else argument
        if isinstance(tensor, torch.Tensor):
            yield tensor
        elif isinstance(argument, tuple):
            yield from _pointers(argument)


def _init_args_hst(self: GridExecutor, args_dev: Any, kwargs: Any) -> Any:
    args_hst, kwargs_hst = _original["_init_args_hst"](self, args_dev, kwargs)
    _State.tensors = list(_pointers([*args_hst, *kwargs_hst.values()]))
    return args_hst, kwargs_hst


def _restore_args_dev(self: GridExecutor, args_dev: Any, args_hst: Any, kwargs: Any, kwargs_hst: Any) -> None:
    # Tensors on the CPU are used in place; the original copies every storage onto itself, however large.
    if any(tensor.device.type != "cpu" for tensor in _pointers([*args_dev, *kwargs.values()])):
        _original["_restore_args_dev"](self, args_dev, args_hst, kwargs, kwargs_hst)


def _call(self: GridExecutor, *args: Any, **kwargs: Any) -> Any:
    _State.kernel = self.fn.__name__
    _State.patched = set()
    try:
        # Modes are for the aten calls around a kernel, not for those that the interpreter makes inside.
        no_modes = torch.utils._python_dispatch._disable_current_modes()
        with np.errstate(all="ignore"), no_modes, torch._C.DisableTorchFunction():
            result = _original["__call__"](self, *args, **kwargs)
    except triton_interpreter.InterpreterError as error:
        # A finding of an observer keeps its own type, from however deep inside device functions it comes.
        cause: BaseException | None = error
        while isinstance(cause, triton_interpreter.InterpreterError):
            cause = cause.__cause__
        if isinstance(cause, ObserverError):
            raise cause from None
        raise
    finally:
        _State.tensors = []
    for observer in _State.observers:
        observer.finished()
    return result


def _patch_lang(fn: Any) -> Any:
    # Every call of a device function, tl.sum and tl.max included, patches triton.language anew, which takes longer than
    # the function. Inside a launch once per module is enough: the launch restores everything when it ends.
    modules = {id(value) for value in fn.__globals__.values() if value is tl or value is tl.core}
    if modules and modules <= _State.patched:
        return triton_interpreter._LangPatchScope()
    _State.patched |= modules
    return _original["_patch_lang"](fn)


def _implicit_cvt(arg: Any) -> Any:
    if isinstance(arg, float):
        return tl.tensor(TensorHandle(np.array([arg], np.float32), tl.float32), tl.float32)
    return _original["_implicit_cvt"](arg)


_original: dict[str, Any] = {}


def _replace(owner: Any, name: str, replacement: Any) -> None:
    if hasattr(owner, name):
        _original[name] = getattr(owner, name)
    setattr(owner, name, replacement)


def _install() -> None:
    _refuse_kernels_defined_before()
    for name, method in vars(_HonestBuilder).items():
        if not name.startswith("__"):
            _replace(InterpreterBuilder, name, method)
    for name, method in dict(
        _init_args_hst=_init_args_hst, _restore_args_dev=_restore_args_dev, __call__=_call
    ).items():
        _replace(GridExecutor, name, method)
    for name, function in dict(_patch_lang=_patch_lang, _implicit_cvt=_implicit_cvt).items():
        _replace(triton_interpreter, name, function)
    for operation in (triton_interpreter.ReduceOps, triton_interpreter.ScanOps):
        operation.apply_impl = _honest_apply(operation.apply_impl)
    for name, function in LIBDEVICE.items():
        for module in (libdevice, cuda_libdevice):
            setattr(module, name, _elementwise(function))


_install()
