"""`collect` as tests start it: in this process, or as a program that can be killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SCRIPT = "import sys; from gadcore.teacher.command import main; sys.exit(main(sys.argv[1:]))"


def prompts_file(path: Path, count: int) -> Path:
    path.write_text("".join(f"Question number {i}?\n" for i in range(count)))
    return path


def arguments(prompts: Path, base_url: str, out: Path, *more: str) -> list[str]:
    return [
        "--prompts.source", str(prompts), "--endpoint.base_url", base_url, "--endpoint.model", "teacher",
        "--output.dir", str(out), *more,
    ]  # fmt: skip


def start(argv: Sequence[str], *, prefix: str = "", **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", prefix + SCRIPT, *argv],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answered(out: Path) -> set[str]:
    """Prompts whose reply is whole on disk, read as a line of the file and not by the code under test."""
    lines = (out / "replies.jsonl").read_bytes().split(b"\n")[:-1]
    found = [json.loads(line) for line in lines]
    return {row["messages"][-1]["content"] for row in found if "reply" in row}
