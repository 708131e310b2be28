"""vLLM's OpenAI server as gadcore needs it, started as a process of its own on loopback."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections import deque
from contextlib import suppress
from pathlib import Path

from gadcore.config.rollout import VLLMServerRollout
from gadcore.config.settings import Config
from gadcore.errors import UserError

_SAID_LINES = 15
_PR_SET_PDEATHSIG = 1


def arguments(config: Config, model_path: str, *, device: str, backend: str) -> list[str]:
    """Of vLLM's OpenAI server, without host and port, for a server that takes a trainer's weights by `backend`."""
    rollout = config.vllm
    named: dict[str, object] = {
        "--dtype": rollout.dtype,
        "--max-model-len": config.context_tokens,
        "--block-size": rollout.block_size,
        "--max-num-seqs": rollout.sequences_at_once("cpu", 0, "") if device == "cpu" else rollout.max_num_seqs,
        "--tensor-parallel-size": rollout.tensor_parallel,
        # Log-probs after the temperature, as the trainer computes them.
        "--logprobs-mode": "processed_logprobs",
        "--generation-config": "vllm",
        "--weight-transfer-config": json.dumps({"backend": backend}),
        "--worker-extension-cls": "gadcore.rollout.server_worker.Extension",
        "--middleware": "gadcore.rollout.server_guard.Guard",
    }
    flags = ["--enable-scale-out", "--skip-tokenizer-init", "--disable-log-stats", "--disable-uvicorn-access-log"]
    flags += ["--enforce-eager"] if rollout.eager(device) else []
    flags += [] if rollout.prefix_caching else ["--no-enable-prefix-caching"]
    if rollout.dtype != rollout.head_dtype == "float32":
        named["--hf-overrides"] = json.dumps({"head_dtype": "float32"})
    if device == "cpu":
        # Seeded prompts whole, as gadcore.rollout.vllm_start has it.
        flags.append("--no-enable-chunked-prefill")
    else:
        named["--gpu-memory-utilization"] = rollout.gpu_memory_utilization
        flags.append("--enable-sleep-mode")
    return [
        "--model",
        model_path,
        *(str(p) for key, value in named.items() if value is not None for p in (key, value)),
        *flags,
    ]


def environment(rollout: VLLMServerRollout, token: str, backend: str) -> dict[str, str]:
    """Variables for it. The token is nowhere else: arguments can be read by everybody on a machine."""
    return {
        "VLLM_API_KEY": token,
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(rollout.kv_cache_gib),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_BATCH_INVARIANT": str(int(rollout.batch_invariant)),
        # Handles of CUDA's memory come pickled, from whoever has the token.
        **({"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"} if backend == "ipc" else {}),
    }


class ServerProcess:
    """A server of a model directory on a free port of loopback."""

    def __init__(self, command: list[str], variables: dict[str, str], port: int | None = None) -> None:
        """command: arguments() of it. port: default a free one."""
        self.port = port or _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._folder = tempfile.TemporaryDirectory(prefix="gadcore-server-")
        self._log = Path(self._folder.name) / "log"
        left_out = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
        inherited = {k: v for k, v in os.environ.items() if k not in left_out and not k.startswith("TORCHELASTIC")}
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *command]
                + ["--host", "127.0.0.1", "--port", str(self.port)],
                env=inherited | variables,
                preexec_fn=_end_with_parent,
                # A group of its own: what the server has started can be ended where the server itself was killed.
                start_new_session=True,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def check(self) -> None:
        """UserError, with the end of what it said, where it has ended."""
        if (code := self.process.poll()) is not None:
            raise UserError(f"the vLLM server ended with exit code {code}; it said last:\n{self.said()}")

    def said(self) -> str:
        """Its last lines."""
        with self._log.open(errors="replace") as lines:
            return "".join(deque(lines, _SAID_LINES)).rstrip()

    def close(self) -> None:
        """By SIGTERM it takes its engine's processes down with it; one that was killed has left them."""
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self._folder.cleanup()


def _end_with_parent() -> None:
    """In the server's process: where the trainer is killed, nobody would end it. Linux alone has this, and means the
    thread that has started it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
