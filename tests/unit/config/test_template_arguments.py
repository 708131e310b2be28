"""data.template_arguments: a table in a file, NAME=VALUE on the command line, refused where it cannot work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gadcore.config.loading import dump, load
from gadcore.errors import UserError
from gadcore.evaluate.settings import EvalConfig


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("enable_thinking=false", {"enable_thinking": False}),
        ("enable_thinking=False", {"enable_thinking": False}),
        ("{enable_thinking = false, effort = 'low'}", {"enable_thinking": False, "effort": "low"}),
        ("effort=low,depth=3", {"effort": "low", "depth": 3}),
        ("a=[1, 2]", {"a": [1, 2]}),
    ],
)
def test_on_the_command_line_and_through_a_file(tmp_path: Path, text: str, expected: dict[str, Any]) -> None:
    config = load(["--data.template_arguments", text])
    assert config.data.template_arguments == expected
    (tmp_path / "config.toml").write_text(dump(config))
    assert load(["--config", str(tmp_path / "config.toml")]).data == config.data
    assert load([f"--data.template_arguments={text}"], EvalConfig).data.template_arguments == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("messages=1", "'messages'"),
        ("add_generation_prompt=true", "'add_generation_prompt'"),
        ("{'a b' = 1}", "'a b'"),
        ("if=1", "'if'"),
        ("day=2024-01-01", "day = 2024-01-01"),
        ("x=nan", "x = nan"),
        ("thinking", "NAME=VALUE"),
        ("5", "must be a table"),
    ],
)
def test_what_is_refused(text: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        load(["--data.template_arguments", text])
    assert "data.template_arguments" in str(caught.value) and words in str(caught.value)
