"""Run folders with what a report reads, written by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def metrics(warmup: int = 4, gad: int = 8, **more: Any) -> list[dict[str, Any]]:
    rows = []
    for step in range(1, warmup + gad + 1):
        stage, stage_step, steps = ("warmup", step, warmup) if step <= warmup else ("gad", step - warmup, gad)
        row = {"stage": stage, "step": step, "stage_step": stage_step, "stage_steps": steps,
               "discriminator/accuracy": 0.6 + 0.01 * step, "time/student": 2.0, "time/total": 2.5}  # fmt: skip
        if stage == "gad":
            row |= {"reward/mean": -1.0 + 0.1 * step, "reward/std": 0.5, "reward/length_corr": 0.1,
                    "length/cut_share": 0.05, "sampler/logprob_diff_mean": 1e-4}  # fmt: skip
        else:
            row["student/ce"] = 2.0 - 0.1 * step
        rows.append(row | more)
    return rows


def answers(quality: float, count: int = 40, **more: Any) -> list[dict[str, Any]]:
    return [
        {"prompt": f"Question {i}", "teacher": f"Teacher {i}", "student": f"Student {i} {quality}",
         "rouge_l": quality + 0.01 * math.sin(i), "length_ratio": 1.1, "teacher_score": 1.0,
         "student_score": 0.2} | more
        for i in range(count)
    ]  # fmt: skip


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def folder(
    path: Path, rows: list[dict[str, Any]], evaluations: dict[str, list[dict[str, Any]]], finished: bool = True
) -> Path:
    (path / "evaluations").mkdir(parents=True)
    (path / "config.toml").write_text('[run]\nname = "try-out"\n[student]\nmodel = "org/student"\n')
    (path / "metrics.jsonl").write_text(lines(rows))
    for name, answer_rows in evaluations.items():
        (path / "evaluations" / f"{name}.jsonl").write_text(lines(answer_rows))
    if finished:
        summary = {
            "run": "try-out",
            "seconds": {"setup": 10.0, "student": 80.0, "total": 100.0},
            "models": {"student": "org/student", "discriminator": "org/judge", "parameters": 134_500_000},
            "data": {"train_rows": 413, "eval_rows": 40, "notes": ["12 prompts were truncated."]},
            "evaluations": {
                name: {"rows": len(r), "rouge_l": sum(x["rouge_l"] for x in r) / len(r), "length_ratio": 1.1,
                       "cut_share": 0.1, "accuracy": 0.75, "margin": 0.8}
                for name, r in evaluations.items()
            },
        }  # fmt: skip
        (path / "summary.json").write_text(json.dumps(summary))
    return path


THREE = {"before": answers(0.2), "after_warmup": answers(0.3), "after_gad": answers(0.3)}
