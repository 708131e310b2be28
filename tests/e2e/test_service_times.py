"""How long a group's answer takes at the size of SmolLM2-135M, and how much of that is the model."""

from __future__ import annotations

import re
import time
import urllib.request
from pathlib import Path

import pytest

from gadcore.data.rows import load_rows
from gadcore.integrations.client import DiscriminatorClient, TextGroup
from tests.support.service import ServiceProcess, settings


def seconds_in_the_model(url: str) -> float:
    text = urllib.request.urlopen(f"{url}/metrics", timeout=30).read().decode()
    found = re.search(r"^gadcore_model_seconds (\S+)$", text, re.MULTILINE)
    assert found is not None
    return float(found[1])


@pytest.mark.by_hand
@pytest.mark.parametrize("samples", [2, 8])
def test_an_answer_is_the_models_time(samples: int, tmp_path: Path) -> None:
    """One client, one group of one of the built-in rows a request, its samples the teacher's to other prompts."""
    sections = settings(tmp_path, discriminator__model="smollm2-135m-instruct", data__train="builtin")
    service = ServiceProcess(tmp_path, sections)
    service.start()
    service.wait_until_ready(300)
    client = DiscriminatorClient(service.url, token="")
    rows = load_rows("builtin", {})
    took = []
    try:
        for k in range(16):
            texts = [
                " ".join(rows[(7 * k + i) % len(rows)].teacher_response.split()[:40]) for i in range(1, samples + 1)
            ]
            if k == 2:
                took, before = [], seconds_in_the_model(service.url)
            start = time.perf_counter()
            client.score_and_update([TextGroup(row=k, samples=texts)])
            took.append(time.perf_counter() - start)
        share = (seconds_in_the_model(service.url) - before) / sum(took)
    finally:
        service.end()
    took.sort()
    print(
        f"\n{samples} samples: p50 {took[len(took) // 2]:.3f} s, p95 {took[int(len(took) * 0.95)]:.3f} s, "
        f"{share:.3f} of it the model"
    )
    # A machine that does something else lets an answer wait outside of the model too.
    assert share > 0.7
