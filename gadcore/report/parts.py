"""What the page of a report says, part by part, as plain values for report.html."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from gadcore.config.curriculum import GateSettings
from gadcore.evaluate.doctor_d_page import doctor_d_section
from gadcore.evaluate.table import evaluation_section
from gadcore.measure.figures import MEASURES, Measure, clock, number
from gadcore.record.tracking import Row
from gadcore.report import findings
from gadcore.report.charts import Band, draw
from gadcore.report.curves import Group, groups_of
from gadcore.report.files import RunFiles
from gadcore.report.findings import MINUS, pretty
from gadcore.report.memory_bars import memory_of
from gadcore.train.convergence import Convergence
from gadcore.train.curriculum import Curriculum
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
# Whoever asks whether the student has improved need not see these.
FOLDED = ("machinery", "hardware", "other")
Fact = tuple[str, str, str]  # label, value, small print


def parts_of(run: RunFiles) -> dict[str, Any]:
    """Every variable of the template except the assets."""
    summary = run.summary or {}
    figures = figures_of(run)
    bands = bands_of(run.metrics)
    warned = findings.warnings(run.metrics)
    return {
        "run": run.name,
        "finished": run.summary is not None,
        "state": _state(run),
        "verdict": [*findings.verdict(figures, run.evaluations), *_decisions(run)],
        "warnings": warned,
        "checked": _checked(run.metrics, bool(warned)),
        "facts": facts_of(run),
        "evaluation": table_of(figures, run.evaluations, pretty, _unfinished(run)),
        "eval_tables": evaluation_section(run.folder / "eval"),
        "doctor_d": doctor_d_section(run.folder, run.evaluations, run.metrics),
        "groups": [group_of(group, bands) for group in groups_of(run.metrics)],
        "memory": memory_of(run),
        "machine": _machine(run),
        "samples": samples_of(run.evaluations),
        "about_samples": "The same prompts after every stage, beside the teacher's response. Scores are the "
        "discriminator's at that time: they compare within one column, not across columns.",
        "orders": ORDERS,
        "training_samples": [_training_sample(row) for row in run.samples],
        "notes": notes_of(run),
        "phases": _phases(summary.get("seconds") or {}),
        "configs": [("config.toml", run.config_text)],
        "folder": run.folder.resolve().name,
    }


def group_of(group: Group, bands: Sequence[Band]) -> dict[str, Any]:
    """A section of charts."""
    return {
        "key": group.key,
        "title": group.title,
        "about": group.about,
        "absent": ", ".join(group.absent),
        "folded": group.key in FOLDED,
        "charts": [{"title": c.title, "about": c.about, "html": draw(c, bands)} for c in group.charts],
    }


def figures_of(run: RunFiles) -> dict[str, Row]:
    """E by name: from summary.json, and for evaluations that it does not know (yet) from their rows."""
    figures: dict[str, Row] = dict((run.summary or {}).get("evaluations") or {})
    for name, rows in run.evaluations.items():
        if name not in figures and rows:
            figures[name] = _figures_of(rows)
    order = [*run.evaluations, *(name for name in figures if name not in run.evaluations)]
    return {name: figures[name] for name in order if name in figures}


def _figures_of(rows: Sequence[Row]) -> Row:
    """E of the rows of an evaluation."""
    found: Row = {"rows": len(rows), "samples": max(len(row.get("samples") or [row["student"]]) for row in rows)}
    for measure in MEASURES:
        values = findings.values_of(measure, rows)
        if values is not None:
            *outer, last = measure.path
            place = found.setdefault(outer[0], {}) if outer else found
            place[last] = fmean(values)
    return found


def _decisions(run: RunFiles) -> list[str]:
    """What the curriculum, the gate and the convergence rule decided, once it stands in summary.json."""
    summary = run.summary or {}
    sentences = Curriculum.of(summary.get("curriculum") or {}).told()
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


def bands_of(rows: Sequence[Row]) -> list[Band]:
    """The stages of a run."""
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


def facts_of(run: RunFiles) -> list[Fact]:
    """The header."""
    summary, config = run.summary or {}, run.config
    models, seconds = (summary.get(key) or {} for key in ("models", "seconds"))
    data, tokens = summary.get("data") or {}, summary.get("tokens") or {}
    student = models.get("student") or config.get("student", {}).get("model", "–")
    discriminator = models.get("discriminator") or config.get("discriminator", {}).get("model", "–")
    if discriminator == "student":
        discriminator = "initialised from the student"
    parameters = f"{models['parameters'] / 1e6:,.1f} M parameters" if models.get("parameters") else ""
    sets = config.get("data", {})
    rows = f"{data['train_rows']} training rows, {data['eval_rows']} held out" if data else ""
    steps = summary.get("steps") or {band.name: band.last - band.first + 1 for band in bands_of(run.metrics)}
    drawn = f"{tokens['sampled']:,} tokens sampled, {tokens['trained']:,} trained on" if tokens else ""
    facts: list[Fact] = [
        ("Student", student, parameters),
        ("Discriminator", discriminator, ""),
        ("Data", str(sets.get("train", "–")), rows),
        ("Steps", ", ".join(f"{pretty(name)} {count}" for name, count in steps.items()) or "none yet", drawn),
        ("Time", *_time(run, seconds)),
    ]
    return facts


def _machine(run: RunFiles) -> list[Fact]:
    machine = (run.summary or {}).get("machine") or {}
    facts: list[Fact] = []
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


def table_of(
    figures: Mapping[str, Row], rows_of: Mapping[str, Sequence[Row]], title: Callable[[str], str], caption: str
) -> dict[str, Any]:
    """The table: a column of the change from first to last and one between neighbours, then one of every evaluation.

    figures: E by name. rows_of: the rows of evaluations by name, which the changes are tested on. title: of a name.
    Neighbours of the same responses, of which a discriminator has judged but one, have no change to show.
    """
    names = list(figures)
    pairs = [
        (a, b)
        for a, b in pairwise(names)
        if not findings.same_responses(a, b, rows_of) or (_judged(figures[a]) and _judged(figures[b]))
    ]
    if len(names) > 2:
        pairs = [(names[0], names[-1]), *pairs]
    rows = []
    for measure in MEASURES:
        values = {name: measure.of(figures[name]) for name in names}
        if all(value is None for value in values.values()):
            continue
        changes = []
        for a, b in pairs:
            one, two = values[a], values[b]
            gap = None if one is None or two is None else two - one
            found = findings.between(a, b, rows_of, measure)
            changes.append(_change(measure, gap, found))
        shown = [measure.show(value).translate(MINUS) for value in values.values()]
        rows.append({"label": measure.label, "values": shown, "changes": changes, "better": BETTER[measure.better]})
    counts = sorted({str(e["rows"]) for e in figures.values() if "rows" in e})
    samples = {e.get("samples", 1) for e in figures.values()}
    each = "one response each" if samples == {1} else f"{' or '.join(map(str, sorted(samples)))} responses each"
    caption = f"On {' or '.join(counts) or 'the'} held-out prompts, {each}.{_teachers_words(figures)}{caption}"
    titles = [f"{title(a)} → {title(b)}" for a, b in pairs]
    return {"names": [title(name) for name in names], "changes": titles, "rows": rows, "caption": caption}


def _judged(evaluation: Row) -> bool:
    return evaluation.get("accuracy") is not None


def _teachers_words(figures: Mapping[str, Row]) -> str:
    """What the teacher's responses have of the measures that they have by themselves."""
    teachers = [e["teacher"] for e in figures.values() if e.get("teacher")]
    if not teachers or any(teacher != teachers[0] for teacher in teachers):
        return ""
    named = [(measure, value) for measure in MEASURES if (value := measure.of(teachers[0])) is not None]
    return " The teacher's: " + ", ".join(f"{measure.label} {measure.show(value)}" for measure, value in named) + "."


def _change(measure: Measure, gap: float | None, found: findings.Difference | None) -> tuple[str, str | None]:
    """(text, kind) of a change: better, worse, noise, untested, or None where no change is better or worse."""
    text = measure.show(gap, signed=True).translate(MINUS)
    if gap is None:
        return text, None
    if found is None or found.margin is None:
        return text, None if measure.better == "discriminator" else "untested"
    around = f"{100 * found.margin:.1f} pp" if measure.share else f"{found.margin:.3f}"
    return f"{text.removesuffix(' pp')} ± {around}", found.change


def _unfinished(run: RunFiles) -> str:
    if run.summary is not None:
        return ""
    return " From the evaluation files, since summary.json is not written yet: some measures are missing."


def samples_of(evaluations: Mapping[str, Sequence[Row]], title: Callable[[str], str] = pretty) -> list[dict[str, Any]]:
    """The responses to every prompt, the teacher's first. evaluations: of the same prompts as far as they go."""
    names = [name for name, rows in evaluations.items() if rows]
    if not names:
        return []
    first, last = names[0], names[-1]
    samples = []
    # Responses that were judged again stand once, with the later scores.
    later = {b: a for a, b in pairwise(names) if findings.same_responses(a, b, evaluations)}
    labels: dict[str, str] = {}
    for name in names:
        labels[name] = f"{labels.pop(later[name])}, {title(name)}" if name in later else title(name)
    for i in range(max(len(evaluations[name]) for name in names)):
        present = {name: evaluations[name][i] for name in names if i < len(evaluations[name])}
        some = next(iter(present.values()))
        sides = [
            {"kind": "teacher", "label": "teacher", "figures": "what the student learns from", "text": some["teacher"]}
        ]
        sides += [
            {
                "kind": "last" if name == last else "",
                "label": labels[name],
                "figures": _side(row),
                "text": row["student"],
            }
            for name, row in present.items()
            if name in labels
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


def notes_of(run: RunFiles) -> list[str]:
    """What happened to data and files."""
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
