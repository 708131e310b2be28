"""A client of the service that may be killed and started again: python service_client.py URL FOLDER NAME COUNT MOST.

It asks for COUNT updates of at most MOST groups, request after request, and writes into FOLDER/NAME.jsonl what it has
sent and what it was answered; now and then it repeats a request that was answered. Imports no torch.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

from gadcore.integrations.client import DiscriminatorClient, TextGroup

WORDS = ["Paris", "is", "a", "city", "on", "the", "Seine", "Water", "boils", "at", "zero", "degrees", "stop", "write"]


def group(name: str) -> TextGroup:
    """Texts that follow from the name alone: a tiny prompt, its teacher, two or three samples."""
    rng = random.Random(name)

    def text() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))

    samples = [text() for _ in range(rng.randint(2, 3))]
    finished = [rng.random() < 0.8 for _ in samples]
    return TextGroup(samples, prompt=text(), teacher_response=text(), finished=finished, id=name)


def groups_of(request_id: str, most: int) -> list[TextGroup]:
    """One group or several, by the id alone."""
    return [group(f"{request_id}/{k}") for k in range(random.Random(request_id).randint(1, most))]


def read_log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def main(url: str, folder: Path, name: str, count: int, most: int) -> None:
    path = folder / f"{name}.jsonl"
    known = {line["id"] for line in read_log(path) if line["what"] == "answered"}
    log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    client = DiscriminatorClient(url, token="", timeout_s=60, patience_s=400)

    def write(what: str, request_id: str, **more: Any) -> None:
        # One call: a kill leaves the whole line or none.
        os.write(log, (json.dumps({"what": what, "id": request_id, **more}) + "\n").encode())

    def ask(what: str, request_id: str) -> None:
        write("sent", request_id)
        found = client.score_and_update(groups_of(request_id, most), request_id=request_id)
        rows = [[teacher, *own] for teacher, own in zip(found.teacher_scores, found.rewards, strict=True)]
        write(what, request_id, version=found.version, scored_by=found.scored_by, scores=rows, again=found.duplicate)

    for k in range(count):
        request_id = f"{name}-{k}"
        if request_id in known:
            continue
        ask("answered", request_id)
        known.add(request_id)
        if random.random() < 0.1:
            ask("repeated", random.choice(sorted(known)))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
