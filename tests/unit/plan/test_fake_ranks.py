"""The plan's memory of many ranks, beside FSDP2 with the real backbone on fake tensors and fake ranks."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from gadcore.data.groups import GroupedBatch, GroupTokens
from gadcore.models.activations import set_mode
from gadcore.models.backbone import decoder_layers, hidden_states, use_packed_attention
from gadcore.models.fused import fuse_backbone
from gadcore.plan.activations import _Agree, kept_bytes
from gadcore.plan.dimensions import find_config, read_config, read_dimensions
from gadcore.plan.memory import gathered_bytes

RANKS, TOKENS = 4, 2048
CHANGES = {"num_hidden_layers": 6, "vocab_size": 20000, "bos_token_id": None, "eos_token_id": None}


class Storages(TorchDispatchMode):
    """The peak of the bytes of all storages that operators have returned; FSDP2 resizes some of them."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, weakref.ref] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if (key := storage._cdata) not in self.known:
                    self.known[key] = weakref.ref(storage)
                    weakref.finalize(storage, self.known.pop, key, None)
        self.peak = max(self.peak, self.bytes())
        return out

    def bytes(self) -> int:
        return sum(s.nbytes() for ref in list(self.known.values()) if (s := ref()) is not None)


@pytest.fixture
def ranks() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    yield
    dist.destroy_process_group()


@pytest.mark.native
@pytest.mark.parametrize("mode", ["off", "full"])
@pytest.mark.filterwarnings("ignore")
def test_a_sharded_step_takes_what_is_planned(tmp_path, ranks, mode) -> None:
    small = json.loads(find_config("Qwen/Qwen2.5-3B-Instruct").read_text())
    (tmp_path / "config.json").write_text(json.dumps(small | CHANGES))
    d, (_, config) = read_dimensions(str(tmp_path)), read_config(str(tmp_path))
    ids = tuple(1 + i % 7 for i in range(TOKENS // 2))
    mesh = init_device_mesh("cpu", (RANKS,))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        use_packed_attention(model)
        with _Agree():
            fuse_backbone(model)
        set_mode(model, mode, TOKENS)
        for layer in decoder_layers(model):
            fully_shard(layer, mesh=mesh)
        fully_shard(model.model, mesh=mesh)
        batch = GroupedBatch.of([GroupTokens(ids, (ids,))], last_tokens=True)
        with Storages() as storages:
            hidden_states(model, batch).sum().backward()
            held = storages.bytes()
            storages.peak = 0
            hidden_states(model, batch).sum().backward()
    # Parameters and gradients, a quarter each.
    shards = 2 * 4 * d.parameters / RANKS
    assert held == pytest.approx(shards, rel=0.02)
    working = kept_bytes(d, mode, TOKENS, autocast=False) + TOKENS * (3 * d.mlp + 2 * d.hidden) * 4
    working += gathered_bytes(d.layer, d.root, 4, working)
    assert shards + working == pytest.approx(storages.peak, rel=0.1)
