"""What the page of a report says, part by part, as plain values for report.html."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from gadcore.config.settings import GateSettings
from gadcore.evaluate.table import evaluation_section
from gadcore.measure.figures import MEASURES, clock, number
from gadcore.record.tracking import Row
from gadcore.report import findings
from gadcore.report.charts import Band, draw
from gadcore.report.curves import groups_of
from gadcore.report.files import RunFiles
from gadcore.report.findings import pretty
from gadcore.report.memory_bars import memory_of
from gadcore.train.convergence import Convergence
from gadcore.train.gate import Gate

BETTER = {
    "higher": "higher",
    "lower": "lower",
    "near 1": "nearer 1",
    "as the teacher": "as the teacher",
    "discriminator": "open",
}
ORDERS = (
    ("file", "As in the file"),
    ("gain -1", "Greatest gain in ROUGE-L"),
    ("gain 1", "Greatest loss in ROUGE-L"),
    ("rouge -1", "Highest ROUGE-L at the end"),
    ("length -1", "Longest beside the teacher's"),
)
MINUS = str.maketrans("-", "−")


def parts_of(run: RunFiles) -> dict[str, Any]:
    """Every variable of the template except the assets."""
    summary = run.summary or {}
    figures = _figures(run)
    bands = _bands(run.metrics)
    warned = findings.warnings(run.metrics)
    return {
        "run": summary.get("run") or run.config.get("run", {}).get("name") or run.folder.resolve().name,
        "finished": run.summary is not None,
        "state": _state(run),
        "verdict": [*findings.verdict(figures, run.evaluations), *_decisions(run)],
        "warnings": warned,
        "checked": _checked(run.metrics, bool(warned)),
        "facts": _facts(run),
        "evaluation": _evaluation(run, figures),
        "eval_tables": evaluation_section(run.folder / "eval"),
        "groups": [
            {
                "key": group.key,
                "title": group.title,
                "about": group.about,
                "absent": ", ".join(group.absent),
                "charts": [{"title": c.title, "about": c.about, "html": draw(c, bands)} for c in group.charts],
            }
            for group in groups_of(run.metrics)
        ],
        "memory": memory_of(run),
        "samples": _samples(run.evaluations),
        "orders": ORDERS,
        "training_samples": [_training_sample(row) for row in run.samples],
        "notes": _notes(run),
        "phases": _phases(summary.get("seconds") or {}),
        "config_text": run.config_text,
        "folder": run.folder.resolve().name,
    }


def _figures(run: RunFiles) -> dict[str, Row]:
    """E by name: from summary.json, and for evaluations that it does not know (yet) from their rows."""
    figures: dict[str, Row] = dict((run.summary or {}).get("evaluations") or {})
    for name, rows in run.evaluations.items():
        if name not in figures and rows:
            figures[name] = {"rows": len(rows)} | {
                key: fmean(row[key] for row in rows) for key in ("rouge_l", "length_ratio")
            }
            pairs = [(r["teacher_score"], r["student_score"]) for r in rows if r.get("student_score") is not None]
            if pairs:
                figures[name] |= {"margin": fmean(t - s for t, s in pairs), "accuracy": fmean(t > s for t, s in pairs)}
    order = [*run.evaluations, *(name for name in figures if name not in run.evaluations)]
    return {name: figures[name] for name in order if name in figures}


def _decisions(run: RunFiles) -> list[str]:
    """What the gate and the convergence rule decided, once it stands in summary.json."""
    summary, sentences = run.summary or {}, []
    if summary.get("gate"):
        gate = Gate.of(summary["gate"])
        sentences.append(gate.message(GateSettings(**run.config.get("gate", {}))))
        if gate.measured[:-1]:
            sentences[-1] += f" Before: {', '.join(f'{accuracy:.3f}' for _, accuracy in gate.measured[:-1])}."
    if summary.get("convergence"):
        convergence = Convergence.of(summary["convergence"])
        sentences.append(convergence.message())
        if convergence.best:
            sentences[-1] += f" The final student is that of step {convergence.best[0]}."
    return sentences


def _bands(rows: Sequence[Row]) -> list[Band]:
    names = list(dict.fromkeys(row["stage"] for row in rows))
    steps = {name: [row["step"] for row in rows if row["stage"] == name] for name in names}
    return [Band(pretty(name), min(steps[name]), max(steps[name])) for name in names]


def _state(run: RunFiles) -> str:
    if run.summary is not None:
        return "finished"
    if not run.metrics:
        return "not finished, no step made yet"
    last = run.metrics[-1]
    return f"not finished: {pretty(last['stage'])} step {last['stage_step']} of {last['stage_steps']}"


def _checked(rows: Sequence[Row], warned: bool) -> str:
    if not rows:
        return "There are no curves to check yet."
    subjects = (
        "numbers that are not finite, discriminator accuracy and margin, reward spread, reward against length and end "
        "marker, length ratio, cut responses, repetition, sampler against trainer"
    )
    return ("" if warned else "No warnings. ") + f"Checked: {subjects}."


def _facts(run: RunFiles) -> list[tuple[str, str, str]]:
    """(label, value, small print) of the header."""
    summary, config = run.summary or {}, run.config
    models, machine, seconds = (summary.get(key) or {} for key in ("models", "machine", "seconds"))
    data, tokens = summary.get("data") or {}, summary.get("tokens") or {}
    student = models.get("student") or config.get("student", {}).get("model", "–")
    discriminator = models.get("discriminator") or config.get("discriminator", {}).get("model", "–")
    if discriminator == "student":
        discriminator = "initialised from the student"
    parameters = f"{models['parameters'] / 1e6:,.1f} M parameters" if models.get("parameters") else ""
    sets = config.get("data", {})
    rows = f"{data['train_rows']} training rows, {data['eval_rows']} held out" if data else ""
    steps = summary.get("steps") or {band.name: band.last - band.first + 1 for band in _bands(run.metrics)}
    drawn = f"{tokens['sampled']:,} tokens sampled, {tokens['trained']:,} trained on" if tokens else ""
    facts = [
        ("Student", student, parameters),
        ("Discriminator", discriminator, ""),
        ("Data", str(sets.get("train", "–")), rows),
        ("Steps", ", ".join(f"{pretty(name)} {count}" for name, count in steps.items()) or "none yet", drawn),
        ("Time", *_time(run, seconds)),
    ]
    if machine:
        versions = ", ".join(
            f"{name} {machine[name]}" for name in ("torch", "vllm", "transformers") if machine.get(name)
        )
        facts.append(("Machine", f"{machine.get('cpu', '–')}, {machine.get('threads', '?')} threads", versions))
        facts.append(("Device", str(machine.get("device", "–")), ""))
    return facts


def _time(run: RunFiles, seconds: Row) -> tuple[str, str]:
    if seconds.get("total") is not None:
        value = clock(seconds["total"]) + " in total"
    else:
        value = clock(sum(row.get("time/total", 0.0) for row in run.metrics)) + " in steps so far"
    summary = run.summary or {}
    if summary.get("started") and summary.get("finished"):
        return value, f"{summary['started']} to {summary['finished']}"
    # Nothing in the files tells a date, so the files themselves have to.
    newest = [run.folder / name for name in ("summary.json", "metrics.jsonl", "config.toml")]
    last = next(path for path in newest if path.exists())
    return value, f"config.toml is of {_date(run.folder / 'config.toml')}, {last.name} of {_date(last)}"


def _date(path: Path) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))


def _evaluation(run: RunFiles, figures: dict[str, Row]) -> dict[str, Any]:
    """The table: a column an evaluation, a column a difference between neighbours, and one from first to last."""
    names = list(figures)
    pairs = list(pairwise(names))
    if len(names) > 2:
        pairs.append((names[0], names[-1]))
    rows = []
    for measure in MEASURES:
        values = {name: measure.of(figures[name]) for name in names}
        if all(value is None for value in values.values()):
            continue
        changes = []
        for a, b in pairs:
            one, two = values[a], values[b]
            gap = None if one is None or two is None else two - one
            found = findings.between(a, b, run.evaluations) if measure.path == ("rouge_l",) else None
            change = "noise" if found and not found.clear else measure.change(one, two)
            changes.append((measure.show(gap, signed=True).translate(MINUS), change))
        shown = [measure.show(value).translate(MINUS) for value in values.values()]
        rows.append({"label": measure.label, "values": shown, "changes": changes, "better": BETTER[measure.better]})
    counts = sorted({str(e["rows"]) for e in figures.values() if "rows" in e})
    caption = f"On {' or '.join(counts) or 'the'} held-out prompts, one response each."
    if run.summary is None:
        caption += " From the evaluation files, since summary.json is not written yet: some measures are missing."
    titles = [f"{pretty(a)} → {pretty(b)}" for a, b in pairs]
    return {"names": [pretty(name) for name in names], "changes": titles, "rows": rows, "caption": caption}


def _samples(evaluations: dict[str, list[Row]]) -> list[dict[str, Any]]:
    names = [name for name, rows in evaluations.items() if rows]
    if not names:
        return []
    first, last = names[0], names[-1]
    samples = []
    for i in range(max(len(evaluations[name]) for name in names)):
        present = {name: evaluations[name][i] for name in names if i < len(evaluations[name])}
        some = next(iter(present.values()))
        sides = [
            {"kind": "teacher", "label": "teacher", "figures": "what the student learns from", "text": some["teacher"]}
        ]
        sides += [
            {
                "kind": "last" if name == last else "",
                "label": pretty(name),
                "figures": _side(row),
                "text": row["student"],
            }
            for name, row in present.items()
        ]
        both = first != last and first in present and last in present
        samples.append(
            {
                "number": i + 1,
                "prompt": some["prompt"],
                "sides": sides,
                "gain": present[last]["rouge_l"] - present[first]["rouge_l"] if both else "",
                "rouge": present[last]["rouge_l"] if last in present else "",
                "length": present[last]["length_ratio"] if last in present else "",
            }
        )
    return samples


def _side(row: Row) -> str:
    text = f"ROUGE-L {row['rouge_l']:.3f} · length ratio {row['length_ratio']:.2f}"
    if row.get("student_score") is not None:
        scores = f" · score {row['student_score']:.2f} (teacher {row['teacher_score']:.2f})"
        text += scores.translate(MINUS)
    return text


def _training_sample(row: Row) -> dict[str, Any]:
    score, reward = (number(row.get(key)).translate(MINUS) for key in ("teacher_score", "reward"))
    return {
        "number": f"Step {row['step']} ({pretty(row['stage'])})",
        "prompt": row["prompt"],
        "sides": [
            {"kind": "teacher", "label": "teacher", "figures": f"score {score}", "text": row["teacher"]},
            {"kind": "last", "label": "student", "figures": f"reward {reward}", "text": row["student"]},
        ],
    }


def _notes(run: RunFiles) -> list[str]:
    summary = run.summary or {}
    notes = [str(note) for note in (summary.get("data") or {}).get("notes") or ()]
    if summary and not notes:
        notes.append("No row was truncated or left out.")
    if run.summary is None:
        notes.append("summary.json is not written yet: what it says about data and machine is missing here.")
    lengths = {len(rows) for rows in run.evaluations.values()}
    if len(lengths) > 1:
        counts = ", ".join(f"{pretty(name)} {len(rows)}" for name, rows in run.evaluations.items())
        notes.append(f"The evaluations differ in their number of rows: {counts}.")
    notes += [f"The last line of {name} is torn (being written, or cut off) and is left out." for name in run.torn]
    return notes


def _phases(seconds: Row) -> list[dict[str, str]]:
    total = seconds.get("total") or 0.0
    parts = {name: value for name, value in seconds.items() if name != "total"}
    rest = total - sum(parts.values())
    if total and rest > 0.005 * total:
        parts["everything else"] = rest
    return [
        {"name": name, "time": clock(value), "share": f"{100 * value / total:.1f} %" if total else "–"}
        for name, value in parts.items()
    ]
