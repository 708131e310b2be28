"""What a vLLM server's workers know of gadcore. Named by --worker-extension-cls: loaded in the workers' processes."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch.nn.functional import linear
from vllm.platforms import current_platform

from gadcore.distributed.reshard_blocks import find_blocks, matrix
from gadcore.distributed.reshard_sums import block_sums
from gadcore.rollout import server_memory
from gadcore.rollout.vllm_start import keep_plain_weights

# Both before a model is loaded.
server_memory.register()
if current_platform.is_cpu():
    keep_plain_weights(linear)


class Extension:
    """Becomes a base class of vLLM's worker."""

    @torch.no_grad()
    def gadcore_sums(self, shapes: str) -> dict[str, list[int]]:
        """Per trainer's parameter the fingerprint of what this worker holds of it (gadcore.distributed.reshard_sums).

        shapes: {name: shape} of the trainer's parameters, as JSON.
        """
        worker: Any = self
        model = worker.model_runner.model
        parameters = dict(model.named_parameters())
        found: dict[str, torch.Tensor] = {}
        for b in find_blocks(model.load_weights, parameters, json.loads(shapes)):
            values = matrix(parameters[b.target].detach())[b.row : b.row + b.rows, b.column : b.column + b.columns]
            if values.numel():
                sums = block_sums(values, b.source_row, b.source_column)
                found[b.source] = found[b.source] + sums if b.source in found else sums
        return {name: sums.tolist() for name, sums in found.items()}
