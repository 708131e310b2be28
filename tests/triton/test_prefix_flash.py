"""prefix_attention by FlashAttention's calls, with a stand-in for them: which rows and keys each gets, and the merging.

The stand-in computes what the package documents, in float64, and leaves what it says nothing about NaN.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gadcore.kernels import prefix_attention as op
from gadcore.kernels.flash import prefix_attention as flash
from gadcore.kernels.layout import PrefixLayout
from gadcore.kernels.prefix_attention import prefix_attention
from tests.support.kernel_grid import F64, relative_error
from tests.support.prefix_kernels import GRADIENT, OUT, RAGGED, inputs, truth

BF16 = torch.bfloat16
LAYOUTS = [
    RAGGED,
    PrefixLayout.of([5], [[3, 4]]),
    PrefixLayout.of([4, 3], [[], []]),
    PrefixLayout.of([2, 3, 1], [[], [1, 6], []]),
]


class StandIn:
    """_flash_attn_fwd and _flash_attn_bwd of flash-attn-4 on a CPU. calls: the arguments of each."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def _sequences(self, lengths: dict[str, Any]) -> Any:
        """(rows, keys, whether each row sees each key) of every sequence."""
        q, k = (lengths[f"cu_seqlens_{name}"] for name in "qk")
        assert q.dtype == k.dtype == torch.int32 and q[0] == k[0] == 0 and len(q) == len(k)
        used = lengths.get("seqused_k")
        for i in range(len(q) - 1):
            rows, begin = slice(int(q[i]), int(q[i + 1])), int(k[i])
            count = int(k[i + 1]) - begin if used is None else int(used[i])
            assert 0 <= count <= int(k[i + 1]) - begin and rows.stop - rows.start <= lengths["max_seqlen_q"]
            assert count <= lengths["max_seqlen_k"]
            sees = torch.ones(rows.stop - rows.start, count, dtype=torch.bool)
            # Aligned at the lower right corner, as the package says.
            yield rows, slice(begin, begin + count), sees.tril(count - len(sees)) if lengths["causal"] else sees

    def _scores(self, q: Tensor, k: Tensor, rows: slice, keys: slice, sees: Tensor, scale: float) -> Tensor:
        group = q.shape[1] // k.shape[1]
        s = torch.einsum("ihd,jhd->hij", q[rows].to(F64), k[keys].to(F64).repeat_interleave(group, 1)) * scale
        return s.masked_fill(~sees, -math.inf)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, return_lse: bool, **lengths: Any
    ) -> Any:
        assert return_lse and q.dtype in (BF16, torch.float16)
        self.calls.append(lengths)
        out, lse = torch.full_like(q, math.nan), torch.full((q.shape[1], len(q)), math.nan)
        for rows, keys, sees in self._sequences(lengths):
            s = self._scores(q, k, rows, keys, sees, softmax_scale)
            lse[:, rows] = s.logsumexp(-1).float()
            if keys.stop > keys.start:
                values = v[keys].to(F64).repeat_interleave(q.shape[1] // k.shape[1], 1)
                out[rows] = torch.einsum("hij,jhd->ihd", s.softmax(-1), values).to(q.dtype)
        return out, lse, None, None, None

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        dout: Tensor,
        lse: Tensor,
        softmax_scale: float,
        *,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        deterministic: bool,
        **lengths: Any,
    ) -> None:
        """By the out and lse that are given, whatever keys they are of."""
        assert deterministic and lse.is_contiguous() and all(x.is_contiguous() for x in (dout, dq, dk, dv))
        self.calls.append(lengths)
        group, heads = q.shape[1] // k.shape[1], k.shape[1]
        delta = (out.to(F64) * dout.to(F64)).sum(-1)
        for x in (dq, dk, dv):
            x.fill_(math.nan)
        for rows, keys, sees in self._sequences(lengths):
            if keys.stop == keys.start or rows.stop == rows.start:
                continue
            s = self._scores(q, k, rows, keys, sees, softmax_scale)
            p = (s - lse[:, rows, None].to(F64)).exp()
            g = dout[rows].to(F64)
            dp = torch.einsum("ihd,jhd->hij", g, v[keys].to(F64).repeat_interleave(group, 1))
            ds = p * (dp - delta[rows].T[:, :, None]) * softmax_scale
            dq[rows] = torch.einsum("hij,jhd->ihd", ds, k[keys].to(F64).repeat_interleave(group, 1)).to(q.dtype)
            wide = (torch.einsum("hij,ihd->jhd", ds, q[rows].to(F64)), torch.einsum("hij,ihd->jhd", p, g))
            for into, x in zip((dk, dv), wide, strict=True):
                into[keys] = x.unflatten(1, (heads, group)).sum(2).to(q.dtype)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """The package's calls, on a GPU that says that it is there."""
    stand_in = StandIn()
    monkeypatch.setattr(flash, "_calls", lambda: (stand_in.forward, stand_in.backward))
    monkeypatch.setattr(op, "flash_missing", lambda: None)
    monkeypatch.setattr(op, "_not_by_flash", lambda query, window: "computes no window" if window else None)
    return stand_in


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: str(layout.prompts))
@pytest.mark.usefixtures("guarded")
def test_out_and_every_gradient(
    calls: StandIn, layout: PrefixLayout, heads: tuple[int, int], dtype: torch.dtype
) -> None:
    *tensors, grad = inputs(layout, heads, 96, dtype)
    leaves = [x.requires_grad_() for x in tensors]
    out = prefix_attention(*leaves, layout, scale=0.125, impl="flash")
    gradients = torch.autograd.grad(out, leaves, grad)
    exact = [x.detach().to(F64).requires_grad_() for x in leaves]
    expected, _ = truth(*exact, layout, 0.125, 0)
    # Both parts of an output are rounded before they are merged, and both parts of a gradient.
    assert relative_error(out, expected.detach(), 1.0) <= OUT[dtype]
    for actual, other in zip(gradients, torch.autograd.grad(expected, exact, grad.to(F64)), strict=True):
        assert actual.dtype == dtype and relative_error(actual, other, 1.0) <= GRADIENT[dtype]
    crossing = len(layout.prompt_of) > len(layout.prompts)
    assert [lengths["causal"] for lengths in calls.calls] == ([True, False] * 2 if crossing else [True] * 2)


def test_a_prompt_s_keys_are_read_where_they_lie(calls: StandIn) -> None:
    q, k, v, _ = inputs(RAGGED, (2, 1), 64, BF16)
    prefix_attention(q, k, v, RAGGED, impl="flash")
    cross = calls.calls[1]
    # [prompt, its responses] of the groups 1 + 5, 19 + 51, 7 + 0: rows of the responses, keys of the prompt alone.
    assert cross["cu_seqlens_q"].tolist() == [0, 1, 6, 25, 76, 83, 83]
    assert cross["cu_seqlens_k"].tolist() == [0, 0, 6, 6, 76, 76, 83]
    assert cross["seqused_k"].tolist() == [0, 1, 0, 19, 0, 7]


def test_long_sequences_are_attended_by_it(calls: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "choose", lambda name, impl, tensor: "triton")
    q = torch.zeros(1, 1, 64, dtype=BF16)
    length = op.FLASH_TOKENS
    assert op._chosen("auto", q, length, 0) == "flash"
    assert op._chosen("auto", q, length - 1, 0) == op._chosen("auto", q, length, 5) == "triton"
    assert op._chosen("triton", q, length, 0) == "triton"
    monkeypatch.setattr(op, "flash_missing", lambda: "not installed")
    assert op._chosen("auto", q, length, 0) == "triton"


def test_what_it_cannot_compute_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, _ = inputs(RAGGED, (2, 1), 64, BF16)
    for message, call in {
        "computes no window": lambda: prefix_attention(q, k, v, RAGGED, window=5, impl="flash"),
        "torch.bfloat16, torch.float16 with D of .*, got torch.float32 64": lambda: prefix_attention(
            q.float(), k.float(), v.float(), RAGGED, impl="flash"
        ),
        "needs tensors on a GPU of sm_90 or sm_100, got cpu": lambda: prefix_attention(q, k, v, RAGGED, impl="flash"),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    monkeypatch.setattr(op, "_not_by_flash", lambda query, window: None)
    monkeypatch.setattr(op, "flash_missing", lambda: "the package flash-attn-4 is not installed")
    with pytest.raises(RuntimeError, match='impl="flash" is not available: the package flash-attn-4'):
        prefix_attention(q, k, v, RAGGED, impl="flash")
