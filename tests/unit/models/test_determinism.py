"""No sum of a step depends on the order in which a GPU's threads arrive: the looking, and the kernels' own sources.

tests/rehearsal/test_determinism.py looks at the steps themselves.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from tests.support.nondeterminism import Looked

ROOT = Path(__file__).parents[3]


def test_what_is_looked_for_is_found() -> None:
    x = torch.ones(3, 2, requires_grad=True)
    with Looked() as seen:
        x.index_select(0, torch.tensor([0, 2, 1])).sum().backward()
        x.gather(0, torch.tensor([[0, 1], [1, 0]])).sum().backward()
        torch.zeros(3, 2).index_add(0, torch.tensor([1, 1]), torch.zeros(2, 2))
        assert not seen.found
        x.index_select(0, torch.tensor([0, 2, 0])).sum().backward()
        x.gather(0, torch.tensor([[0, 1], [0, 0]])).sum().backward()
        torch.zeros(3, 2).index_copy(0, torch.tensor([1, 1]), torch.zeros(2, 2))
        torch.ones(3).cumsum(0)
    assert len(seen.found) == 4, seen.found


def test_no_kernel_adds_by_atomics() -> None:
    """What happens inside of an op is not dispatched, so its source is read."""
    sources = [*(ROOT / "kernels" / "triton").glob("*.py"), *(ROOT / "csrc" / "cuda").glob("*.cu*")]
    assert len(sources) > 8
    words = r"tl\.atomic|atomicAdd|red\.global|index_add|index_put|scatter|torch\.cumsum|bincount"
    assert [path.name for path in sources if re.search(words, path.read_text(encoding="utf-8"))] == []
