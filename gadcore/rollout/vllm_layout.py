"""vLLM's layout of a model at any size of tensor parallelism, without its processes, without memory, on any machine.

The model is made on the device "meta", once for every rank of a sampler, with stand-ins for the groups of ranks that
its layers ask about, and its loader is watched (gadcore.distributed.reshard_blocks).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import AutoConfig, AutoModelForCausalLM

from gadcore.config.rollout import VLLMRollout
from gadcore.distributed.reshard import Layout, Mesh
from gadcore.distributed.reshard_blocks import Block, find_blocks
from gadcore.errors import foreign
from gadcore.rollout.vllm_start import import_vllm

# A context that every model has; the layout does not depend on it.
_CONTEXT = 128


@dataclass(frozen=True)
class _Group:
    """What vLLM's layers ask of a group of ranks."""

    world_size: int
    rank_in_group: int

    @property
    def is_first_rank(self) -> bool:
        return self.rank_in_group == 0

    @property
    def is_last_rank(self) -> bool:
        return self.rank_in_group == self.world_size - 1


def layouts(
    directory: str, mesh: Mesh, degrees: Sequence[int], *, trainer: torch.dtype, engine: torch.dtype
) -> Iterator[tuple[int, Layout]]:
    """(ranks of a sampler, the layout) for each of `degrees`, of the model whose config.json lies in a directory.

    mesh: of the trainer; ranks that follow each other are one sampler. trainer, engine: dtypes of the weights.
    Raises UserError where vLLM cannot run the model on so many ranks.
    """
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for degree in degrees:
        blocks: list[list[Block]] = []
        names: set[str] = set()
        with foreign(f"vLLM cannot run the model {directory} on {degree} ranks", "take another number"):
            for rank in range(degree):
                made = _model(directory, degree, rank, engine)
                parameters = dict(made.named_parameters())
                names |= parameters.keys()
                blocks.append(find_blocks(made.load_weights, parameters, shapes))  # type: ignore[arg-type]
        yield (
            degree,
            Layout(
                mesh,
                shapes,
                dict.fromkeys(shapes, trainer),
                dict.fromkeys(names, engine),
                [blocks[rank % degree] for rank in range(mesh.size)],
            ),
        )


def _model(directory: str, degree: int, rank: int, dtype: torch.dtype) -> nn.Module:
    """vLLM's model of one rank, without memory."""
    import_vllm(VLLMRollout(), linear)
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    arguments = EngineArgs(
        model=directory,
        skip_tokenizer_init=True,
        dtype=str(dtype).removeprefix("torch."),  # type: ignore[arg-type]
        max_model_len=_CONTEXT,
        enforce_eager=True,
        tensor_parallel_size=degree,
        distributed_executor_backend="external_launcher",
    )
    made = arguments.create_engine_config()
    with _groups(degree, rank), set_current_vllm_config(made), set_default_torch_dtype(dtype), torch.device("meta"):
        return initialize_model(made)


@contextmanager
def _groups(degree: int, rank: int) -> Iterator[None]:
    """Inside, this process is one rank of `degree`."""
    from vllm.distributed import parallel_state

    alone = _Group(1, 0)
    groups = {"_TP": _Group(degree, rank), **dict.fromkeys(("_PP", "_DP", "_EP", "_PCP", "_DCP"), alone)}
    with ExitStack() as stack:
        for name, group in groups.items():
            stack.enter_context(mock.patch.object(parallel_state, name, group))
        yield
