"""One vLLM server for all tests that ask one: its start is most of their time."""

from __future__ import annotations

import pytest

from tests.support.tiny import save_tiny
from tests.support.vllm_server import VllmServer


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("vllm")
    with VllmServer(save_tiny(folder / "tiny"), folder / "server.log") as running:
        yield running
