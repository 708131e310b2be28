"""Files of responses, and judges whose taste is known, for the tests of judging by models and by people."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from gadcore.evaluate.responses import ResponseRow, write_responses
from tests.support.openai_server import Handler, completion


def rows(responses: list[str], references: list[str] | None = None) -> list[ResponseRow]:
    texts = zip(responses, references or [f"reference {i}" for i in range(len(responses))], strict=True)
    return [
        ResponseRow(f"Question {i}?", ({"role": "user", "content": f"Question {i}?"},), reference, response, True,
                    f"test:{i}", True, i)
        for i, (response, reference) in enumerate(texts)
    ]  # fmt: skip


def folder(path: Path, **models: list[ResponseRow]) -> Path:
    """<path>/held/<model>.jsonl"""
    for model, its_rows in models.items():
        write_responses(path / "held" / f"{model}.jsonl", its_rows)
    return path


def judged_by(verdict: Callable[[str, str], str]) -> Callable[[str, int], Callable[[Handler], None]]:
    """A server's behaviour: replies verdict(answer A, answer B), as the prompt shows them."""

    def behave(prompt: str, attempt: int) -> Callable[[Handler], None]:
        found = re.search(r"<answer A>\n(.*)\n</answer A>\n\n<answer B>\n(.*)\n</answer B>", prompt, re.DOTALL)
        assert found, prompt
        return lambda handler: handler.reply(200, completion(verdict(found[1], found[2])))

    return behave


def arguments(section: str, responses: Path, base_url: str, **more: object) -> list[str]:
    settings = {f"{section}.responses": responses, "endpoint.base_url": base_url, "endpoint.model": "judge",
                "endpoint.max_retries": 0, "endpoint.concurrency": 2}  # fmt: skip
    settings |= {name.replace("__", "."): value for name, value in more.items()}
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def result(responses: Path, name: str) -> dict:
    """name: judge/<judge>/<model> or compare/<judge>/<a>/<b>."""
    return json.loads((responses / "held" / f"{name}.json").read_text())
