"""The fingerprint of a sync over shards: what the trainer has, and what the engines of all ranks have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from gadcore.distributed.reshard import Layout, Mesh
from gadcore.distributed.reshard_blocks import Shape, matrix
from gadcore.distributed.world import World

# Of a tensor that is cast to be looked at.
_CAST_BYTES = 16 << 20


def block_sums(values: Tensor, row: int, column: int) -> Tensor:
    """[4] int64 of a block [rows, columns] that begins at a row and column of its whole: the sum of its bits, the same
    weighted by row, and by column, and the count of entries. Sums of the blocks of a whole are sums of the whole."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    bits = values.view(integer)
    by_row, by_column = bits.sum(1, dtype=torch.int64), bits.sum(0, dtype=torch.int64)
    rows = torch.arange(row + 1, row + 1 + len(by_row), device=values.device)
    columns = torch.arange(column + 1, column + 1 + len(by_column), device=values.device)
    count = by_row.new_tensor(values.numel())
    return torch.stack([by_row.sum(), (by_row * rows).sum(), (by_column * columns).sum(), count])


@torch.no_grad()
def trainer_sums(
    shapes: Mapping[str, Shape],
    dtypes: Mapping[str, torch.dtype],
    mesh: Mesh,
    world: World,
    weights: Iterable[tuple[str, Tensor]],
) -> Tensor:
    """[parameters, 4] int64, of the trainer's shards as the engine would hold them, over all ranks: each row once.

    dtypes: the engine's, by the trainer's names.
    """
    order = {name: i for i, name in enumerate(shapes)}
    found, first = None, mesh.ranks[0]
    for name, tensor in weights:
        local = matrix(tensor.to_local() if isinstance(tensor, DTensor) else tensor)
        if found is None:
            found = torch.zeros(len(order), 4, dtype=torch.int64, device=local.device)
        # Other replicas have the same rows.
        if world.rank not in first or not local.numel():
            continue
        start = first.index(world.rank) * mesh.chunk(tensor.shape[0] if tensor.dim() else 1)
        run = max(1, _CAST_BYTES // max(1, local[:1].nbytes))
        for at in range(0, len(local), run):
            found[order[name]] += block_sums(local[at : at + run].to(dtypes[name]), start + at, 0)
    assert found is not None
    return world.sum_(found)


@torch.no_grad()
def engine_sums(layout: Layout, world: World, parameters: Mapping[str, Tensor]) -> Tensor:
    """[parameters, 4] int64, over the engines of all ranks, of the places that the trainer's parameters have there."""
    order = {name: i for i, name in enumerate(layout.shapes)}
    device = next(iter(parameters.values())).device
    found = torch.zeros(len(order), 4, dtype=torch.int64, device=device)
    for b in layout.blocks[world.rank]:
        values = matrix(parameters[b.target].detach())[b.row : b.row + b.rows, b.column : b.column + b.columns]
        if values.numel():
            found[order[b.source]] += block_sums(values, b.source_row, b.source_column)
    return world.sum_(found)


def differing(names: Sequence[str], trainer: Tensor, engine: Tensor) -> list[str]:
    """The parameters that the engines do not hold as the trainer has them; one read of the device where all are.

    What several ranks hold counts as often in the engines' sums.
    """
    copies = engine[:, 3] // trainer[:, 3].clamp(min=1)
    same = (engine == trainer * copies[:, None]).all(1) & (copies > 0)
    if bool(same.all()):
        return []
    return [name for name, agrees in zip(names, same.tolist(), strict=True) if not agrees]
