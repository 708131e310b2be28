"""vLLM in a server of its own, on loopback or elsewhere: samples and weights over HTTP and vLLM's weight transfer.

Without rollout.url gadcore starts the server and ends it. Weights go through shared memory where the server computes on
this machine's CPU, by CUDA's handles on the same GPUs ("ipc"), and by NCCL to others. Every update gets a version,
which the server tells with every token that it samples: one that was restarted has none of ours and gets the weights
again.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from gadcore.config.rollout import VLLMServerRollout
from gadcore.config.settings import Config
from gadcore.data.groups import Response
from gadcore.data.template import ChatTemplate
from gadcore.distributed.reshard import Mesh, mesh_of
from gadcore.distributed.reshard_sums import differing, trainer_sums
from gadcore.distributed.world import ALONE, World
from gadcore.errors import UserError
from gadcore.memory.holdings import EnginePart
from gadcore.rollout.engine import Done, Engine, Pending, SampleRequest, There, WeightsLost
from gadcore.rollout.probe import check_distribution, sample_for_check
from gadcore.rollout.server_client import Client, ServerGone
from gadcore.rollout.server_pending import ServerPending
from gadcore.rollout.server_process import ServerProcess, arguments, environment
from gadcore.rollout.weights import PlainWeights, WeightSource


class ServerEngine(Engine):
    """A vLLM server as an Engine. Of several ranks the first one talks to it, and all have its responses."""

    holds_memory = True
    batches_prompts = True
    spans_ranks = True
    shared = False

    @classmethod
    def make(
        cls,
        config: Config,
        model_path: str,
        model: PreTrainedModel,
        template: ChatTemplate,
        there: There,
        world: World = ALONE,
    ) -> Engine:
        return cls(config, model_path, model, template, there, world)

    @classmethod
    def shares_weights(cls, config: Config, device: str, ranks: int = 1) -> bool:
        return False

    @classmethod
    def samples_elsewhere(cls, config: Config, device: str) -> bool:
        # One that gadcore starts beside a GPU has the trainer's, and sleeps by turns.
        rollout = config.rollout
        assert isinstance(rollout, VLLMServerRollout)
        return device == "cpu" or (rollout.url is not None and rollout.transfer != "ipc")

    @classmethod
    def dtype(cls, config: Config) -> str:
        return config.vllm.dtype

    def __init__(
        self,
        config: Config,
        model_path: str,
        model: PreTrainedModel,
        template: ChatTemplate,
        there: There = nullcontext,
        world: World = ALONE,
    ) -> None:
        """there, world: see Engine.make()."""
        assert isinstance(config.rollout, VLLMServerRollout)
        self._settings, self.template, self._world = config.rollout, template, world
        device = model.device.type
        self._backend = _backend(config.rollout, device, world)
        self._sleeps = device == "cuda" and config.rollout.url is None
        self._process: ServerProcess | None = None
        self._sender: Any = None
        self._updates, self._name = 0, secrets.token_hex(4)
        self._current = False
        self._pending: ServerPending | None = None
        self._source = _source(model, getattr(torch, config.vllm.dtype), whole=self._backend != "memory")
        self._mesh = Mesh.even(1) if world.size == 1 else mesh_of(*next((p, n) for n, p in model.named_parameters()))
        try:
            with world.agreeing():
                if world.is_first:
                    self._begin(config, model_path, device)
            with there():
                self.wake("weights")
                self.update_weights(PlainWeights(model))
                self.wake("kv_cache")
                prompt, tokens = sample_for_check(model, config.context_tokens)
                ((sample,),) = self.generate([SampleRequest(prompt, 1, 0)], temperature=1.0, max_tokens=tokens)
                check_distribution(model, model_path, self.dtype(config), prompt, sample)
            self.sleep()
        except BaseException:
            self.close()
            raise

    def _begin(self, config: Config, model_path: str, device: str) -> None:
        """Starts the server, or finds it, and sees that it is one that can be used."""
        url, token = self._settings.url, os.environ.get(self._settings.token_env, "")
        if url is None:
            token = token or secrets.token_urlsafe(24)
            command = arguments(config, model_path, device=device, backend=_NAMES[self._backend])
            self._process = ServerProcess(command, environment(self._settings, token, self._backend))
            url = self._process.url
        self.client = Client(url, token, timeout_s=self._settings.answer_s)
        self._wait()
        self.client.check_version()
        (served,) = self.client.get("/v1/models")["data"][:1]
        if served["max_model_len"] < config.context_tokens:
            raise UserError(
                f"the vLLM server {url} holds {served['max_model_len']} tokens of context, this run needs "
                f"{config.context_tokens}: start it with --max-model-len {config.context_tokens}"
            )

    def _wait(self) -> None:
        """Until the server is ready. UserError where it is not, in time or at all."""
        try:
            self.client.wait(self._settings.wait_s, self._process.check if self._process else lambda: None)
        except ServerGone as error:
            raise UserError(
                f"{error}: start it again, or give it longer by rollout.wait_s, and go on with --resume auto"
            ) from None

    # Samples

    def generate(
        self, requests: Sequence[SampleRequest], *, temperature: float, max_tokens: int, done: Done | None = None
    ) -> list[list[Response]]:
        if not self._current:
            raise RuntimeError("the server has none of the trainer's weights: update them first")
        found: list[list[Response]] | None = None
        with self._world.agreeing():
            if self._world.is_first:
                found = self._drawn(requests, temperature, max_tokens, done)
        found = self._world.broadcast_object(found)
        if found is None:
            self._current = False
            raise WeightsLost("the vLLM server was restarted while it sampled")
        if done is not None and not self._world.is_first:
            for place, responses in enumerate(found):
                done(place, responses)
        return found

    def _drawn(
        self, requests: Sequence[SampleRequest], temperature: float, max_tokens: int, done: Done | None
    ) -> list[list[Response]] | None:
        """The responses; None where the server was restarted, and is there again."""
        found: list[list[Response]] = [[] for _ in requests]
        lost, version = False, self.client.version

        def answered(place: int, answer: Mapping[str, Any]) -> None:
            nonlocal lost
            samples = self._samples(requests[place], version, answer)
            lost = lost or samples is None
            found[place] = samples or []
            if done is not None and not lost:
                done(place, found[place])

        try:
            self.client.generate([self._body(r, temperature, max_tokens) for r in requests], answered)
        except ServerGone:
            self._wait()
            return None
        return None if lost else found

    def begin(self, requests: Sequence[SampleRequest], *, temperature: float, max_tokens: int) -> Pending:
        if not self._current:
            raise RuntimeError("the server has none of the trainer's weights: update them first")
        client = self.client if self._world.is_first else None
        version = client.version if client is not None else ""
        self._pending = ServerPending(
            client,
            [self._body(request, temperature, max_tokens) for request in requests],
            read=lambda place, answer: self._samples(requests[place], version, answer),
            back=self._wait,
            lost=self._forget,
            world=self._world,
        )
        return self._pending

    def _forget(self) -> None:
        """The server has none of the trainer's weights any more."""
        self._current = False

    def _samples(self, request: SampleRequest, version: str, answer: Mapping[str, Any]) -> list[Response] | None:
        """The responses to a request; None where they are of other weights than those of this version."""
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        if {span["version"] for choice in choices for span in choice["weight_versions"] or ()} != {version}:
            return None
        samples = [self._response(choice) for choice in choices]
        # Greedily all samples of a prompt are one.
        return samples if len(samples) == request.n else samples * request.n

    def _body(self, request: SampleRequest, temperature: float, max_tokens: int) -> dict[str, Any]:
        return {
            "token_ids": list(request.prompt_ids),
            "sampling_params": {
                "n": request.n if temperature > 0 else 1,
                "temperature": temperature,
                "max_tokens": max_tokens,
                "seed": request.seed,
                "logprobs": 0,
                # As in gadcore.rollout.vllm.
                "stop_token_ids": [self.template.end_id],
                "ignore_eos": True,
                "detokenize": False,
            },
        }

    def _response(self, choice: Mapping[str, Any]) -> Response:
        ids = tuple(choice["token_ids"])
        logprobs = tuple(step["logprob"] for step in choice["logprobs"]["content"])
        text, finished = self.template.text_of(ids)
        return Response(text, ids, finished, logprobs)

    # Weights

    def update_weights(self, source: WeightSource) -> None:
        if not self._is_ours():
            # Its first weights, or a server that was restarted.
            self._connect()
        pairs = list(source)
        self._updates += 1
        if self._world.is_first:
            self.client.version = f"gadcore-{self._name}-{self._updates}"
        self._source.current = pairs
        try:
            self._sender.send_weights()
        finally:
            self._source.current = []
        self._compare(pairs)
        # Cached keys and values belong to the old weights.
        with self._world.agreeing():
            if self._world.is_first and not self.client.post("/reset_prefix_cache")["success"]:
                raise RuntimeError("the vLLM server did not reset its prefix cache")
        self._current = True

    def _is_ours(self) -> bool:
        """Whether the server has weights of this engine's."""
        same = False
        with self._world.agreeing():
            if self._world.is_first and self.client.version:
                try:
                    found = self.client.get("/weight_info")
                except ServerGone:
                    self._wait()
                    found = self.client.get("/weight_info")
                same = found["weight_version"] == self.client.version
        return self._world.broadcast_object(same)

    def _connect(self) -> None:
        """Opens the way for weights."""
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

        if self._sender is not None:
            self._sender.shutdown()
            self._sender = None
        client: Any = self.client if self._world.is_first else None
        self._sender = WeightTransferTrainerFactory.trainer_init(
            _init_info(self._backend, self._world, client, self._settings), client=client, source=self._source
        )

    def _compare(self, pairs: Sequence[tuple[str, Tensor]]) -> None:
        """RuntimeError where the fingerprint of what the server has is another than the trainer's."""
        shapes = {name: tuple(tensor.shape) for name, tensor in pairs}
        dtypes = dict.fromkeys(shapes, self._source.dtype)
        expected = trainer_sums(shapes, dtypes, self._mesh, self._world, pairs)
        with self._world.agreeing():
            if self._world.is_first:
                asked = {"method": "gadcore_sums", "args": [json.dumps(shapes)]}
                found = torch.zeros_like(expected, device="cpu")
                for worker in self.client.post("/collective_rpc", asked)["results"]:
                    found += torch.tensor([worker.get(name, [0] * 4) for name in shapes])
                if wrong := differing(list(shapes), expected.cpu(), found):
                    raise RuntimeError(
                        f"the server's weights differ from the trainer's after an update, in {len(wrong)} parameters, "
                        f"of which {wrong[0]} is the first"
                    )

    def weights(self) -> dict[str, Tensor]:
        raise RuntimeError("the weights are in the server's memory")

    # Memory

    def sleep(self) -> None:
        if self._sleeps and self._current:
            with self._world.agreeing():
                if self._world.is_first:
                    self.client.post("/sleep", level="2")
            self._current = False

    def wake(self, part: EnginePart) -> None:
        if self._sleeps:
            with self._world.agreeing():
                if self._world.is_first:
                    self.client.post("/wake_up", tags=part)

    def close(self) -> None:
        if self._pending is not None:
            self._pending.abandon()
        if self._sender is not None:
            self._sender.shutdown()
        if self._process is not None:
            self._process.close()
        if hasattr(self, "client"):
            self.client.close()


# What vLLM calls them.
_NAMES = {"memory": "gadcore_memory", "ipc": "ipc", "nccl": "nccl"}


def _backend(settings: VLLMServerRollout, device: str, world: World) -> str:
    """How weights travel."""
    chosen = settings.transfer
    if chosen == "auto":
        chosen = "memory" if device == "cpu" else "ipc" if settings.url is None else "nccl"
    if chosen != "memory" and device == "cpu":
        raise UserError(f'rollout.transfer = "{chosen}" is for GPUs, and this run is on a CPU: take "memory"')
    if chosen == "memory" and world.nodes > 1:
        raise UserError(
            f'rollout.transfer = "memory" is for one machine, and {world.nodes} train together: take "nccl"'
        )
    return chosen


def _init_info(backend: str, world: World, client: Client | None, settings: VLLMServerRollout) -> Any:
    """What vLLM's factory makes a sender of."""
    if backend == "memory":
        from gadcore.rollout import server_memory

        server_memory.register()
        return server_memory.MemoryTrainerInfo(rank=world.rank, world=world)
    if backend == "ipc":
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        return IPCTrainerInitInfo(rank=world.rank, packed=True)
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
    from vllm.utils.network_utils import get_ip, get_open_port

    workers = client.get("/get_world_size")["world_size"] if client is not None else 1
    host = "127.0.0.1" if settings.url is None else get_ip()
    return NCCLTrainerInitInfo(
        rank=world.rank, master_address=host, master_port=get_open_port(), world_size=1 + workers
    )


def _source(model: PreTrainedModel, dtype: torch.dtype, *, whole: bool) -> Any:
    """The trainer's weights as vLLM's weight transfer wants them. whole: gathered and cast, one by one."""
    from vllm.distributed.weight_transfer.base import ParamMeta
    from vllm.distributed.weight_transfer.base import WeightSource as VLLMSource

    metadata = [ParamMeta(name, dtype, tuple(p.shape)) for name, p in model.named_parameters()]

    class Source(VLLMSource):
        current: Sequence[tuple[str, Tensor]] = ()

        def metadata(self) -> list[ParamMeta]:
            return metadata

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            for name, tensor in self.current:
                if whole:
                    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                    yield name, full.to(dtype)
                else:
                    yield name, tensor

    made = Source()
    made.dtype = dtype  # type: ignore[attr-defined]
    return made
