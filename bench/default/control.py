"""The student that GAD began with, sampled at a higher temperature: what GAD's own change is to be held against."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from bench import record
from bench.methods.training import arguments, toml_table
from gadcore.checkpoint import store
from gadcore.evaluate.measure import values_of
from gadcore.evaluate.responses import read_responses
from gadcore.measure.figures import MEASURES
from gadcore.report.files import RunFiles
from gadcore.report.findings import difference

Row = dict[str, Any]
# Of the run's own: 0.8 becomes 0.9.
HOTTER = 1.125
_NAME, _SET = "before_gad", "held_out"


def control(run: RunFiles, steps_before: int) -> Row | None:
    """Means of the control, and GAD's differences to it, paired by prompt; None without that checkpoint.

    steps_before: of the stages before GAD. Raises RuntimeError where sampling fails.
    """
    checkpoint = store.at(run.folder / "checkpoints", steps_before)
    if not checkpoint.is_dir() or "after_gad" not in run.evaluations:
        return None
    data, rollout = run.config["data"], run.config["rollout"]
    temperature = round(HOTTER * rollout["temperature"], 3)
    out = run.folder.with_name(f"{run.folder.name}-control")
    settings = {
        "eval.models": toml_table({_NAME: str(checkpoint)}),
        "eval.in_domain": toml_table({_SET: data["eval"]}),
        "eval.rows": data["eval_rows"],
        "eval.samples": data["eval_samples"],
        "eval.out": out,
        "sampling.engine": rollout["engine"],
        "sampling.temperature": temperature,
        "data.max_prompt_tokens": data["max_prompt_tokens"],
        "data.max_response_tokens": data["max_response_tokens"],
        "fresh.enabled": False,
        "run.threads": run.config["run"]["threads"],
    }
    command = [sys.executable, "-m", "gadcore.run", "eval", *arguments(settings)]
    record.say(f"default: the control of {run.folder.name}")
    done = subprocess.run(command, cwd=record.ROOT)
    if done.returncode != 0:
        raise RuntimeError(f"the control of {run.folder} ended with exit code {done.returncode}")
    responses = read_responses(out / _SET / f"{_NAME}.jsonl")
    values = values_of(responses)
    prompts = [row.prompt for row in responses if row.sample == 0]
    rows = [{"prompt": prompt, **{k: v[i] for k, v in values.items()}} for i, prompt in enumerate(prompts)]
    changes, means = {}, {}
    for measure in MEASURES:
        found = difference(measure, rows, run.evaluations["after_gad"]) if len(measure.path) == 1 else None
        if found is not None and found.margin is not None:
            means[measure.label] = sum(row[measure.path[0]] for row in rows) / len(rows)
            changes[measure.label] = {"mean": found.mean, "margin": found.margin, "change": found.change}
    return {"temperature": temperature, "means": means, "changes": changes}
