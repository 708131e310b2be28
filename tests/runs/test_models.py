"""A run on a model whose files say more than training reads: it ends with a student that can be served."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoTokenizer, GenerationConfig

from tests.support.runs import run, tiny_arguments

THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think></think>' }}{% endif %}{% endif %}"
)


def test_a_hybrid_with_settings_of_sampling(tmp_path: Path) -> None:
    arguments = [*tiny_arguments(tmp_path), "--run.dir", "out", "--schedule.warmup_steps", "1"]
    arguments += ["--schedule.gad_steps", "1", "--data.template_arguments", "enable_thinking=false"]
    (tmp_path / "model/chat_template.jinja").write_text(THINKING)
    # As Vicuna's, which transformers loads and then refuses to save.
    (tmp_path / "model/generation_config.json").write_text(json.dumps({"temperature": 0.9, "top_p": 0.6}))
    result = run(arguments, tmp_path)
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert any("do_sample = true" in note for note in summary["data"]["notes"])
    for name in ("student", "discriminator"):
        render = AutoTokenizer.from_pretrained(tmp_path / "out" / name).apply_chat_template
        prompt = render([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
        assert prompt.endswith("<|im_start|>assistant\n<think></think>")
    saved = GenerationConfig.from_pretrained(tmp_path / "out/student")
    assert saved.do_sample is True and saved.top_p == 0.6
