"""Starting vLLM in the trainer's process, alone or as one rank of several."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from gadcore.config.rollout import VLLMSettings
from gadcore.config.settings import Config
from gadcore.distributed.world import World
from gadcore.errors import UserError

Linear = Callable[..., Any]


def import_vllm(settings: VLLMSettings, linear: Linear | None):  # type: ignore[no-untyped-def]
    """vLLM, told by the environment what it reads there. linear: of its layers, on a CPU; None: on a GPU."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if linear is not None:
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(settings.kv_cache_gib)
        # The trainer's threads are not vLLM's to bind.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        # Nothing here needs Triton on a CPU; it is warned of before the level above is read.
        logging.getLogger("vllm.triton_utils.importing").setLevel(logging.ERROR)
        keep_plain_weights(linear)
    else:
        # Read by vLLM as it is imported, too.
        os.environ["VLLM_BATCH_INVARIANT"] = str(int(settings.batch_invariant))
        # vLLM would let Triton print of the trainer's kernels (vllm/utils/jit_monitor.py).
        os.environ.setdefault("TRITON_PRINT_AUTOTUNING", "0")
    import vllm

    return vllm


def keep_plain_weights(linear: Linear) -> None:
    """Makes vLLM's layers on a CPU keep their weights as they are, and compute with `linear`. Before a model is loaded.

    vLLM's own repack their weights and empty the originals; later updates then fail, one of them (the tied output head)
    without an error.
    """
    import vllm.model_executor.layers.utils as layer_utils

    def plain(layer: nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = linear  # type: ignore[assignment]

    layer_utils.dispatch_cpu_unquantized_gemm = plain


def check_gpu(settings: VLLMSettings) -> None:
    """Raises UserError where vLLM cannot be started on the GPU with these settings."""
    if settings.batch_invariant and torch.cuda.get_device_capability() < (9, 0):
        # enable_batch_invariant_mode() in vllm/model_executor/determinism/batch_invariant.py: aten::matmul and
        # aten::linear of the whole process get kernels without a backward pass.
        raise UserError(
            "batch_invariant = true needs a GPU of compute capability 9.0 or later: on others vLLM replaces matrix "
            "products of the trainer by some that have no gradient: leave it at false"
        )
    # vLLM asks the same (request_memory() in vllm/v1/worker/utils.py), and knows no setting of ours by name. It counts
    # what torch keeps without using it as taken until it has given that back itself.
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    wanted = math.ceil(total * settings.gpu_memory_utilization)
    if free < wanted:
        raise UserError(
            f"gpu_memory_utilization = {settings.gpu_memory_utilization} asks for {wanted / 1e9:.1f} GB of the GPU for "
            f"vLLM, and {free / 1e9:.1f} of its {total / 1e9:.1f} GB are free: lower it, or end what else uses the GPU"
        )


def check_ranks(settings: VLLMSettings, world: World) -> None:
    """Raises UserError where the ranks of a node are no whole number of samplers."""
    degree, per_node = settings.tensor_parallel, world.size // world.nodes
    if per_node % degree:
        raise UserError(
            f"rollout.tensor_parallel = {degree} does not divide the {per_node} processes of a node: give a number "
            "that does, or start another number by torchrun --nproc-per-node"
        )


def start(
    vllm: Any,
    config: Config,
    model_path: str,
    world: World,
    *,
    on_cpu: bool,
    eager: bool,
    lora: Mapping[str, Any] | None = None,
) -> Any:
    """vLLM's LLM with the model of a directory; asleep in nothing. lora: arguments of a slot for adapters."""
    rollout = config.vllm
    # The trainer's logits are float32, made of bfloat16 products; so are these, then (LogitsProcessor in
    # vllm/model_executor/layers/logits_processor.py). The head's weights stay what they are, tied or not.
    head = {"head_dtype": rollout.head_dtype} if rollout.dtype != rollout.head_dtype == "float32" else {}
    return vllm.LLM(
        model=model_path,
        dtype=rollout.dtype,
        hf_overrides=head,
        max_model_len=config.context_tokens,
        block_size=rollout.block_size,
        # None is vLLM's own limit.
        max_num_seqs=rollout.sequences_at_once("cpu", 0, "") if on_cpu else rollout.max_num_seqs,
        enable_prefix_caching=rollout.prefix_caching,
        # CUDA graphs hold addresses. Those of weights and KV cache stay over sleep and wake, which unmap and map
        # them again (vllm/device_allocator/cumem.py), and over updates, which write in place. What graphs need for
        # themselves is within gpu_memory_utilization, and stays while vLLM sleeps.
        enforce_eager=eager,
        # Log-probs after the temperature, as the trainer computes them.
        logprobs_mode="processed_logprobs",
        # The model's own generation_config is neither read nor obeyed.
        generation_config="vllm",
        enable_sleep_mode=not on_cpu,
        disable_log_stats=True,
        use_tqdm_on_load=False,
        **(lora or {}),
        **(
            # Where only a part of a seeded prompt fits into a batch, vLLM turns back its generator, which a CPU's
            # cannot: whole prompts then.
            {"enable_chunked_prefill": False} if on_cpu else {"gpu_memory_utilization": rollout.gpu_memory_utilization}
        ),
        **({} if world.size == 1 else _over_ranks(rollout, world, on_cpu)),
    )


def _over_ranks(rollout: VLLMSettings, world: World, on_cpu: bool) -> dict[str, Any]:
    """Arguments for a vLLM whose workers are the trainer's own processes.

    `tensor_parallel` ranks that follow each other are one sampler, which all of them drive with the same requests; the
    others are further ones, of which vLLM knows nothing ("ExternalDP" in vllm/distributed/parallel_state.py).
    """
    _keep_trainers_group()
    if on_cpu:
        _name_shared_memory(world)
    return {"tensor_parallel_size": rollout.tensor_parallel, "distributed_executor_backend": "external_launcher"}


def _keep_trainers_group() -> None:
    """A vLLM that ends would end the processes' default group with its own."""
    from vllm.distributed import parallel_state

    def end_own() -> None:
        if parallel_state._WORLD is not None:
            parallel_state._WORLD.destroy()
        parallel_state._WORLD = parallel_state._NODE_COUNT = None

    parallel_state.destroy_distributed_environment = end_own


def _name_shared_memory(world: World) -> None:
    """Ranks on a CPU talk through shared memory, which vLLM calls after the ranks alone where somebody else has started
    them: two jobs on one machine would write into each other's. So the name gets one of this job."""
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    job = world.broadcast_object(f"{os.getpid()}-{os.urandom(4).hex()}")
    theirs = _CPUSHMDistributed.make_group_name

    def named(communicator: Any) -> str:
        return f"gadcore-{job}-{theirs(communicator).lstrip('/')}"

    _CPUSHMDistributed.make_group_name = staticmethod(named)  # type: ignore[method-assign]
