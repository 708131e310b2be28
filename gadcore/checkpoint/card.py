"""The model card of an exported checkpoint: where it comes from, what it was trained on and how, what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from gadcore import __version__
from gadcore.config.settings import Config
from gadcore.text import code

# Figures of a held-out evaluation that a reader of a card looks for.
FIGURES = {
    "rouge_l": "ROUGE-L beside the teacher's response",
    "words": "words of a response",
    "repeated": "share of responses that say a 3-gram twice",
    "distinct_2": "distinct-2",
    "cut_share": "share of responses that were cut",
}
SETTINGS = (
    "data.system_prompt",
    "data.max_prompt_tokens",
    "data.max_response_tokens",
    "discriminator.model",
    "rollout.group_size",
    "rollout.temperature",
    "schedule.batch_size",
    "student.lr",
    "student.warmup_lr",
    "discriminator.lr",
    "algorithm.kl_coef",
    "run.seed",
)
# Of a model that was trained by one; the folder adapter/ beside the weights holds it alone.
ADAPTER = ("adapter", "adapter_rank", "adapter_alpha", "adapter_targets", "adapter_base", "adapter_from")
# (what a run is one of, its tag, its paper).
GAD = ("Generative Adversarial Distillation", "gad", "2511.10643")
# By the stage that only a baseline has.
METHODS = {
    "seqkd": ("the baseline SeqKD, cross-entropy on a teacher's responses", "seqkd", "1606.07947"),
    "soda": ("the baseline SODA, DPO against a snapshot's own responses", "soda", "2604.03873"),
}


# Of the step that the checkpoint was made after, from the run's metrics.jsonl.
OF_A_STEP = {
    "discriminator/accuracy": "share of pairs whose teacher scores higher than the student's sample",
    "discriminator/margin": "mean of the teacher's score less the sample's",
    "discriminator/loss": "Bradley-Terry loss",
}
SCORING = """
## Scores

`D(x, y)` is the logit at the last token of a response: the end marker where the response ended by itself, else the
token where it was cut. Only differences between responses to the same prompt mean something.

```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

FOLDER, END = "PATH OR HUB ID OF THIS MODEL", {end!r}
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForSequenceClassification.from_pretrained(FOLDER, dtype=torch.float32)
messages = [{{"role": "user", "content": "Name a city."}}]
prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
for response in ("Paris." + END, "Zero degrees" + END, "Paris is a"):
    inputs = tokenizer(prompt + response, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        print(model(**inputs).logits.item())
```

vLLM: `LLM(FOLDER, runner="pooling").classify(prompts, pooling_params=PoolingParams(use_activation=False))`, with the
same token ids as prompts, `TokensPrompt(prompt_token_ids=ids)`; `outputs.probs[0]` is the score. gadcore:
`Discriminator.load(FOLDER)`.
"""


def model_card(
    config: Config,
    which: str,
    progress: Mapping[str, Any],
    *,
    end: str = "",
    figures: Mapping[str, float] | None = None,
) -> str:
    """README.md of a model directory. progress: where the run stood, as the checkpoint holds it.

    end: the text that ends a response in the chat template. figures: those of the checkpoint's step, by their names in
    metrics.jsonl.

    Names and paths are written as code: they come from outside.
    """
    base = config.student.model if which == "student" else config.discriminator_model
    method, tag, paper = next((METHODS[s] for s in METHODS if s in progress["lasted"] or s == progress["stage"]), GAD)
    head = ModelCardData(
        library_name="transformers",
        tags=["distillation", tag, "gadcore"],
        base_model=base if "/" in base and not Path(base).exists() else None,
        pipeline_tag="text-generation" if which == "student" else "text-classification",
    )
    steps = {**progress["lasted"], progress["stage"]: progress["stage_step"]}
    done = ", ".join(f"{count} steps of {stage}" for stage, count in steps.items() if stage and count)
    adapted = getattr(config, which).adapter != "none"
    keys = SETTINGS + tuple(f"{which}.{name}" for name in ADAPTER if adapted)
    settings = {key: getattr(getattr(config, (parts := key.split("."))[0]), parts[1]) for key in keys}
    lines = [
        "---",
        head.to_yaml(),
        "---",
        f"# {code(config.run.name)}, step {progress['step']}",
        "",
        f"The {which} of a run of {method} ([arXiv {paper}](https://arxiv.org/abs/{paper}))"
        f" by gadcore {__version__}. It began as {code(base)} and was trained for {done or '0 steps'} on a teacher's "
        f"responses, as text, from {code(config.data.train)}.",
        "",
        "| setting | value |",
        "| --- | --- |",
        *(f"| `{key}` | {code(str(value))} |" for key, value in settings.items() if value is not None),
        *_figures(progress["evaluations"] if which == "student" else {}),
        *(_of_the_discriminator(progress, figures or {}) if which == "discriminator" else []),
        *(SCORING.format(end=end).rstrip().split("\n") if which == "discriminator" else []),
    ]
    return "\n".join(lines) + "\n"


def _figures(evaluations: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The table of the held-out evaluations, in the order in which they were made."""
    if not evaluations:
        return []
    rows = sorted({str(figures["rows"]) for figures in evaluations.values() if "rows" in figures})
    names = [name.replace("_", " ") for name in evaluations]
    lines = ["", f"On {' or '.join(rows) or 'the'} held-out prompts:", "", f"| | {' | '.join(names)} |"]
    lines.append("| --- |" + " ---: |" * len(names))
    for key, label in FIGURES.items():
        values = [figures.get(key) for figures in evaluations.values()]
        if any(value is not None for value in values):
            shown = ("" if value is None else f"{value:.3f}" for value in values)
            lines.append(f"| {label} | {' | '.join(shown)} |")
    return lines


def _of_the_discriminator(progress: Mapping[str, Any], figures: Mapping[str, float]) -> list[str]:
    """How well it could tell the teacher from the student, as far as the run has measured it."""
    rows = [(f"{label}, in the last step", figures.get(key)) for key, label in OF_A_STEP.items()]
    gate = progress.get("gate", {}).get("measured", ())
    rows += [(f"accuracy on prompts held out, after step {step}", accuracy) for step, accuracy in gate]
    told = [f"| {label} | {value:.3f} |" for label, value in rows if value is not None]
    return ["", "| teacher against student | |", "| --- | ---: |", *told] if told else []
