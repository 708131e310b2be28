"""gadcore serve [RUN_FOLDER] [--host H] [--port N] [--name NAME] [-- vLLM's own arguments]"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from gadcore.errors import UserError
from gadcore.evaluate.trained import trained_student
from gadcore.text import say


def main(arguments: Sequence[str]) -> int:
    """Becomes vLLM's OpenAI server of a student; returns only where it cannot. Raises UserError for bad input.

    On loopback unless another host is named; VLLM_API_KEY in the environment is the key that it asks for.
    """
    mine, theirs = list(arguments), []
    if "--" in mine:
        cut = mine.index("--")
        mine, theirs = mine[:cut], mine[cut + 1 :]
    options = _parser().parse_args(mine)
    student = trained_student(Path(options.run))
    if importlib.util.find_spec("vllm") is None:
        raise UserError(f"serve needs vLLM, which is not installed here; `gadcore chat {options.run}` does not")
    from gadcore.config.device import best_device

    on_cpu = best_device().type == "cpu"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(student.folder)]
    command += ["--served-model-name", options.name, "--host", options.host, "--port", str(options.port)]
    # On a CPU compiling takes minutes, and a student answers within seconds without; -- --no-enforce-eager compiles.
    as_on_cpu = ["--dtype", "float32", "--block-size", "32", "--enforce-eager"]
    command += [*(as_on_cpu if on_cpu else ["--dtype", "bfloat16"]), *theirs]
    environment = {"VLLM_NO_USAGE_STATS": "1", **os.environ}
    if on_cpu:
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", **environment}
    say(f"{student.folder} as {options.name!r} at http://{options.host}:{options.port}/v1, once vLLM has started")
    if student.system_prompt is not None:
        say(f"it was trained with this system message, send it too: {student.system_prompt!r}")
    sys.stdout.flush()
    os.execve(sys.executable, command, environment)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"serve: {message}; vLLM's own arguments stand behind --; see serve --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="gadcore serve", description="The student behind vLLM's OpenAI server.")
    parser.add_argument("run", metavar="RUN_FOLDER", nargs="?", default="runs/latest", help="or a model's folder")
    parser.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1: this machine alone")
    parser.add_argument("--port", type=int, default=8000, help="default 8000")
    parser.add_argument("--name", default="student", help="of the model in requests; default student")
    return parser
