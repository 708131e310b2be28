"""The ops as torch sees them (schemas, meta tensors, autograd, torch.compile), and how an implementation is chosen."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gadcore.kernels import dispatch
from gadcore.kernels.bt_score import bt_score
from gadcore.kernels.cpu import native
from gadcore.kernels.cpu.linear_few_rows import linear_few_rows
from gadcore.kernels.grpo_ratio_loss import grpo_ratio_loss
from gadcore.kernels.layout import GroupLayout, PrefixLayout
from gadcore.kernels.linear_grpo_loss import linear_grpo_loss
from gadcore.kernels.linear_logprob import linear_logprob
from gadcore.kernels.ops import OPS, module_of
from gadcore.kernels.prefix_attention import prefix_attention
from tests.support.grid_checks import GRIDS

T, H, V = 6, 8, 11
LAYOUT = GroupLayout.of([2, 1], teacher=False, lengths=[3, 1, 2])
PAIRS = GroupLayout.of([2], teacher=True)
PACKED = PrefixLayout.of([2, 1], [[2], [1]])
CLIP = dict(clip_low=0.2, clip_high=0.2)


def leaf(*shape: int, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(device).requires_grad_()


def targets(device: str = "cpu") -> Tensor:
    return torch.tensor([0, 10, -100, 3, 4, 5], device=device)


def grpo(hidden: Tensor, weight: Tensor, device: str = "cpu", layout: GroupLayout = LAYOUT) -> Tensor:
    return linear_grpo_loss(
        hidden,
        weight,
        targets(device),
        layout,
        advantages=torch.tensor([1.0, -1.0, 0.5], device=device),
        ref_logprob=torch.full((T,), -2.0, device=device),
        kl_coef=0.1,
        denominator=T,
        **CLIP,
    ).loss


# Arguments of ops that have no grid; the others get those of its cases.
ARGUMENTS: dict[str, Callable[[], tuple]] = {
    "linear_few_rows": lambda: (leaf(3, H).detach(), leaf(V, H).detach(), None),
    "prefix_attention": lambda: (
        *(leaf(T, 4, H), leaf(T, 2, H), leaf(T, 2, H), PACKED.offsets, PACKED.prompt_of),
        *(0.5, 2, PACKED.longest, "cpu"),
    ),
    "rms_norm": lambda: (leaf(T, H), leaf(H), 1e-5, 1.0),
    "swiglu": lambda: (leaf(T, H), leaf(T, H)),
}


class Arguments(TorchDispatchMode):
    """Keeps the arguments of the first call of torch.ops.gadcore.<op>, as leaves where they have a gradient."""

    def __init__(self, op: str) -> None:
        super().__init__()
        self.op, self.found = getattr(torch.ops.gadcore, op).default, ()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is self.op and not self.found:
            self.found = tuple(a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in args)
        return func(*args, **(kwargs or {}))


def of_grid(op: str) -> Iterator[tuple]:
    """Arguments of `op` in a few cases of its grid."""
    cases = GRIDS[op].cases
    for case in cases[:: max(1, len(cases) // 6)]:
        with Arguments(op) as arguments:
            GRIDS[op].check(*case, "cpu", torch.float32)
        yield arguments.found


@pytest.mark.native
@pytest.mark.parametrize("name", [op for op, of in OPS.items() if of.cpu and of.passes])
def test_opcheck(name: str) -> None:
    """Schema, autograd registration, fake tensors and AOT dispatch, by torch's own checker."""
    importlib.import_module(module_of(name))
    for arguments in of_grid(name) if OPS[name].grid else [ARGUMENTS[name]()]:
        assert arguments
        torch.library.opcheck(getattr(torch.ops.gadcore, name).default, arguments)


def test_meta_tensors() -> None:
    device = "meta"
    hidden, weight = leaf(T, H, device=device), leaf(V, H, device=device)
    logprob, entropy = linear_logprob(hidden, weight, targets(device), return_entropy=True)
    assert logprob.shape == entropy.shape == (T,) and logprob.dtype == torch.float32
    logprob.sum().backward()
    assert weight.grad is not None and weight.grad.shape == (V, H)
    layout = GroupLayout.of([2, 1], teacher=False, lengths=[3, 1, 2], device=device)
    loss = grpo(hidden, weight, device, layout)
    loss.backward()
    assert loss.shape == () and hidden.grad is not None and hidden.grad.shape == (T, H)
    ratio = grpo_ratio_loss(
        leaf(T, device=device), torch.ones(T, device=device), ref_logprob=None, kl_coef=0.0, denominator=1, **CLIP
    )
    assert ratio.loss.device.type == "meta"
    pairs = GroupLayout.of([2], teacher=True, device=device)
    scored = bt_score(
        hidden, torch.zeros(3, dtype=torch.int64, device=device), leaf(H, device=device), None, pairs, denominator=2
    )
    assert scored.scores.shape == scored.margin.shape == (3,)
    assert linear_few_rows(hidden.detach(), weight.detach()).shape == (T, V)
    query, key = leaf(T, 4, H, device=device), leaf(T, 2, H, device=device)
    attended = prefix_attention(query, key, key, PrefixLayout.of([2, 1], [[2], [1]], device))
    attended.sum().backward()
    assert attended.shape == (T, 4, H) and key.grad is not None and key.grad.shape == (T, 2, H)


def test_compiled_without_a_graph_break_gives_the_same_loss_and_gradients() -> None:
    def step(hidden: Tensor, weight: Tensor, head: Tensor) -> Tensor:
        query, key, value = hidden.view(T, 4, 2).split([2, 1, 1], 1)
        hidden = hidden + prefix_attention(query, key, value, PACKED, window=3).flatten(1).repeat(1, 2)
        scored = bt_score(hidden, torch.tensor([1, 3, 5]), head, None, PAIRS, denominator=2)
        return grpo(hidden, weight) + scored.loss + linear_logprob(hidden, weight, targets()).mean()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    inputs = leaf(T, H), leaf(V, H), leaf(H)
    eager, traced = step(*inputs), compiled(*inputs)
    torch.testing.assert_close(traced, eager)
    for one, other in zip(torch.autograd.grad(traced, inputs), torch.autograd.grad(eager, inputs), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.native
def test_gradients_are_handed_out_once_and_not_copied() -> None:
    hidden, weight = leaf(T, H), leaf(V, H)
    loss = grpo(hidden, weight)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="handed out already"):
        loss.backward()
    assert weight.grad is not None and weight.grad.is_contiguous()


def test_an_unused_gradient_is_not_computed() -> None:
    hidden, weight = leaf(T, H), leaf(V, H).detach()
    loss = grpo(hidden, weight)
    (grad,) = torch.autograd.grad(loss, hidden)
    assert grad.shape == hidden.shape and weight.grad is None
    with torch.no_grad():
        assert not grpo(hidden, weight).requires_grad


def test_autocast_does_not_round_what_is_computed_in_float32() -> None:
    hidden, weight = leaf(T, H), leaf(V, H)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = linear_logprob(hidden, weight, targets())
    expected = linear_logprob(hidden.bfloat16(), weight.bfloat16(), targets())
    assert torch.equal(actual, expected)
    assert not torch.equal(actual, actual.bfloat16().float())


@pytest.mark.parametrize("impl", ["auto", "reference", "cpu"])
def test_what_does_not_fit_is_refused_by_name(impl: dispatch.Impl) -> None:
    hidden, weight = leaf(T, H), leaf(V, H)
    for message, call in {
        "hidden must be": lambda: linear_logprob(hidden[0], weight, targets(), impl=impl),
        r"weight must be \[V, 8\]": lambda: linear_logprob(hidden, weight.T, targets(), impl=impl),
        "targets must be int64": lambda: linear_logprob(hidden, weight, targets().int(), impl=impl),
        r"bias must be \[11\]": lambda: linear_logprob(hidden, weight, targets(), bias=leaf(3), impl=impl),
        "temperature must be above 0": lambda: linear_logprob(hidden, weight, targets(), temperature=0.0, impl=impl),
        "of one dtype": lambda: linear_logprob(hidden, weight.bfloat16(), targets(), impl=impl),
        "either rewards or advantages": lambda: linear_grpo_loss(
            hidden, weight, targets(), LAYOUT, ref_logprob=None, kl_coef=0, denominator=1, impl=impl, **CLIP
        ),
        "groups must own 6 tokens, own 3": lambda: linear_grpo_loss(
            hidden,
            weight,
            targets(),
            GroupLayout.of([1], teacher=False, lengths=[3]),
            rewards=torch.ones(1),
            ref_logprob=None,
            kl_coef=0,
            denominator=1,
            impl=impl,
            **CLIP,
        ),
        "last_index must be int64": lambda: bt_score(hidden, targets(), leaf(H), None, PAIRS, denominator=1, impl=impl),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("impl", ["reference", pytest.param("cpu", marks=pytest.mark.native)])
def test_a_target_outside_the_vocabulary_is_an_error(impl: dispatch.Impl) -> None:
    wrong = torch.tensor([0, V, 1, 2, 3, 4])
    with pytest.raises((RuntimeError, IndexError)):
        linear_logprob(leaf(T, H), leaf(V, H), wrong, impl=impl)


def test_an_implementation_asked_for_by_name_and_not_there_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight = leaf(T, H), leaf(V, H)
    with pytest.raises(ValueError, match="impl must be one of auto, reference, cpu, triton, is 'fast'"):
        linear_logprob(hidden, weight, targets(), impl="fast")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="needs tensors on a GPU, got cpu"):
        linear_logprob(hidden, weight, targets(), impl="triton")
    with pytest.raises(ValueError, match="computes in torch.float32, torch.bfloat16, torch.float16, got torch.float64"):
        linear_logprob(hidden.double(), weight.double(), targets(), impl="cpu")
    monkeypatch.setattr(dispatch, "triton_missing", lambda: "the package triton is not installed")
    with pytest.raises(RuntimeError, match="not available: the package triton is not installed"):
        linear_logprob(hidden, weight, targets(), impl="triton")
    monkeypatch.setattr(native, "why_missing", lambda op: "it was not built")
    with pytest.raises(RuntimeError, match="cpu_linear_logprob is not available: it was not built"):
        linear_logprob(hidden, weight, targets(), impl="cpu")


def test_the_reason_for_a_missing_library_is_said_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As a warning where the library was not asked for by name, and as an error where it was."""
    hidden, weight = leaf(T, H), leaf(V, H)
    native._notice.cache_clear()
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "_native.so")
    monkeypatch.delenv("GADCORE_NO_NATIVE", raising=False)
    monkeypatch.setattr(native, "_unusable", native._load())
    try:
        with pytest.warns(UserWarning, match=r"_native\.so was not built"):
            linear_logprob(hidden, weight, targets())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            linear_logprob(hidden, weight, targets())
        with pytest.raises(RuntimeError, match="was not built: build it with"):
            linear_logprob(hidden, weight, targets(), impl="cpu")
        native.LIBRARY.write_bytes(b"not a library")
        monkeypatch.setattr(native, "_unusable", native._load())
        with pytest.raises(RuntimeError, match="cannot be loaded"):
            linear_logprob(hidden, weight, targets(), impl="cpu")
    finally:
        native._notice.cache_clear()


def test_without_native_code_every_op_takes_its_reference_and_says_nothing() -> None:
    """GADCORE_NO_NATIVE=1 in a process of its own: what was loaded here would stay."""
    code = (
        "import torch; from gadcore.kernels import dispatch; from gadcore.kernels.ops import OPS\n"
        "print({dispatch.choose(op, 'auto', torch.ones(2)) for op, of in OPS.items() if of.passes})"
    )
    environment = os.environ | {"GADCORE_NO_NATIVE": "1"}
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "{'reference'}", done.stderr


@pytest.mark.filterwarnings("ignore:native CPU ops are not in use")
def test_auto_falls_back_to_the_reference_where_nothing_was_built(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight = leaf(T, H), leaf(V, H)
    expected = linear_logprob(hidden, weight, targets(), impl="reference")
    monkeypatch.setattr(native, "why_missing", lambda op: "it was not built")
    assert torch.equal(linear_logprob(hidden, weight, targets()), expected)
