"""docs/measured/step.md, wholly generated from bench/results/step.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from bench import record
from bench.step import flops
from bench.step.problem import SHAPE
from bench.step.suite import CASES, LITERAL, REAL, SAMPLES, TRL
from bench.tables import Read, Row, cell, mib, missing, provenance, rows_of, table

DOCUMENT = record.DOCUMENTS / "step.md"

HEADER = """# The whole GAD step, measured

Generated from `bench/results/step.json` by `python -m bench tables`: do not edit. Made by `python -m bench step`.

A step is: N samples for each of B prompts, rewards by the discriminator D, a GRPO step of the student against a
reference policy, a Bradley-Terry step of D. All sides have the same weights, prompts, lengths, settings, fp32 and
threads. Each is a process of its own; ours and one opponent take a step in turn, the first of each is dropped.
Between turns the machine rests for `rest s` (-: the measurement did not say): a virtual one gives the memory that a
side has freed back to its host, which slows whoever computes meanwhile. Ours makes its optimizers' states before its
first step, as a run does.
Seconds are CPU time on one thread and wall time on two, medians over the steps; a ratio is the median over the steps
of theirs over ours.

Our side is measured with its native ops, which is what `ours` means, and as the `schedule alone`, in a process with
`GADCORE_NO_NATIVE=1`: what a step saves by doing nothing twice, computed by PyTorch's own operations as the opponents
are, and sampled by vLLM.

- TRL: GRPOTrainer as it comes, but bf16 and gradient checkpointing off, fused AdamW, one optimizer step a batch. It
  samples with transformers' `generate()`, its own way on a CPU. Its reward function scores with D in a pass of its
  own; D is then trained on the samples and one teacher row a group.
- literal: the schedule of the paper's code. Padded rows, a pass of D for rewards, one of the policy for old
  log-probs, one of the reference, logits of every token, the teacher's row repeated N times. It samples with our vLLM
  engine, but with PyTorch's linear layers in it; it recomputes no activations (the paper's code does).

A ratio is shown only where, in the same run, the first step of all sides on small ragged groups agreed with fp64:
rewards, losses and all gradients of both models, within a relative L2 error of 1e-5 (1e-4 for the worst single
parameter). `without sampling` leaves the samplers and the weight updates out of both sides' time, `their
sampling free` out of theirs alone."""

LIMIT = """FLOPs of the matrix products that the packed step cannot do without (attention included; a backward pass
counts as two products for each of the forward pass, recomputation not at all), over what one large fp32 product
reached in the same process between the same steps: by MKL, or by oneDNN where that is faster."""

PHASES = """Seconds of each phase. Ours has one discriminator pass: its scores are the rewards. `other` is what
belongs to none: a trainer's own work between the passes."""

ALONE = """The columns are those above, with the schedule alone as ours."""

MEMORY = """The highest resident memory of a process during a timed step, and that above its level with all models
loaded, before its first step (so with the optimizers' states). At the larger shapes every side takes one group a
pass. Between turns malloc gives back what it keeps, on every side; ours keeps its pool of tensors, which counts
here."""


ARITHMETIC = """FLOPs of the opponents' schedules over those of the packed step, for N = 8, both models of
SmolLM2-135M's widths, every response of full length, attention causal: what the ratio would be if all sides reached the
same share of the product limit. `with checkpointing` adds the forward passes that the paper's code computes again; the
literal side that is measured does not."""

PROFILE = """One more step of ours under torch's profiler, on one thread, after the timed ones: CPU seconds of
operations without those that they call. What is left of the whole step is Python, dispatch, and the profiler itself.
Products are `aten::mm` and `aten::addmm`, by MKL, `mkldnn::_linear_pointwise`, by oneDNN, and
`gadcore::cpu_weight_gradient`; with AVX-512 those of the head are inside of the grouped operations."""


def files() -> dict[Path, str]:
    return {DOCUMENT: document()}


def document(read: Read = rows_of) -> str:
    """The whole file."""
    rows = read("step")
    if not rows:
        return "\n\n".join([HEADER, *missing("step")]) + "\n"
    rows = sorted(rows, key=_place)
    # Our own side is much the same beside each opponent: told once for every case.
    ours = list({(row["case"], row["threads"]): row for row in reversed(rows)}.values())[::-1]
    sections = [
        ("Ratios", [provenance(rows), _ratios(rows)]),
        ("The schedule alone", _alone(rows)),
        ("What FLOPs alone would give", [ARITHMETIC, _arithmetic()]),
        ("Memory", [MEMORY, _memory(rows)]),
        ("Share of the matrix-product limit", [LIMIT, _limits(ours)]),
        ("Phases", [PHASES, *_phases(rows)]),
        ("Profile", [PROFILE, *_profiles(ours)]),
        ("Errors of the gates", [_errors(rows)]),
    ]
    parts = [HEADER, *(f"## {title}\n\n" + "\n\n".join(blocks) for title, blocks in sections)]
    return "\n\n".join(parts) + "\n"


def _place(row: Row) -> tuple[int, int, int]:
    names, opponents = [case.name for case in CASES], (TRL, LITERAL)
    case = names.index(row["case"]) if row["case"] in names else len(names)
    return case, row["threads"], opponents.index(row["opponent"])


def _arithmetic() -> str:
    settings: dict[str, Any] = SHAPE
    widths = flops.Widths.of(LlamaConfig(**settings))
    body = []
    for case in CASES:
        if case.name != REAL:
            sizes = (widths, case.prompt, case.response, SAMPLES)
            ours = flops.packed(*sizes)
            others = (flops.trl(*sizes), flops.literal(*sizes), flops.literal(*sizes, recompute=True))
            ratios = [f"{other / ours:.2f}" for other in others]
            body.append([f"P={case.prompt} R={case.response}", f"{ours / 1e9:.0f}", *ratios])
    return table(["case", "GFLOP a group", "TRL", "literal", "literal with checkpointing"], body)


def _profiles(rows: Sequence[Row]) -> list[str]:
    blocks: list[str] = []
    for row in rows:
        if profile := row.get("profile"):
            whole, operations = profile["seconds"], profile["operations"]
            left = whole - sum(seconds for _, seconds, _ in operations)
            body = [
                [f"`{name}`", f"{seconds:.2f}", f"{seconds / whole:.1%}", str(calls)]
                for name, seconds, calls in operations
            ]
            body.append(["outside of operations", f"{left:.2f}", f"{left / whole:.1%}", ""])
            blocks += [f"### {_case(row)[0]}", table(["operation", "s", "share", "calls"], body)]
    return blocks or ["Not measured."]


def _case(row: Row) -> list[str]:
    shape = row["shape"]
    what = "real text, at most " if row["config"]["lengths"] != "forced" else ""
    return [f"{what}P={shape['P']} R={shape['R']}", str(row["threads"])]


def _ratios(rows: Sequence[Row]) -> str:
    header = ["case", "threads", "clock", "beside", "ours s", "theirs s", "with native ops", "schedule alone"]
    header += ["without sampling", "their sampling free", "spread", "rest s"]
    return table(header, [_ratio(row) for row in rows])


def _ratio(row: Row) -> list[str]:
    first, rest = [*_case(row), row["clock"], row["opponent"]], cell(row["config"].get("rest_s"))
    if row["gate"] != "pass":
        return [*first, "-", "-", "gate FAILED", "-", "-", "-", "-", rest]
    alone = row.get("schedule_alone")
    seconds, ratio, others, spread = _figures(row)
    return [*first, *seconds, ratio, "-" if alone is None else f"{alone['ratio']:.2f}", *others, spread, rest]


def _figures(compared: Row) -> tuple[list[str], str, list[str], str]:
    """Of one of our sides beside an opponent: the seconds of both, the ratio, the ratios by sampling, the spreads."""
    ours, theirs = compared["ours"], compared["theirs"]
    return (
        [f"{side['median_s']:.2f}" for side in (ours, theirs)],
        f"{compared['ratio']:.2f}",
        [f"{compared[f'ratio_{what}']:.2f}" for what in ("without_sampling", "their_sampling_free")],
        f"{ours['spread']:.0%}, {theirs['spread']:.0%}",
    )


def _alone(rows: Sequence[Row]) -> list[str]:
    shown = [row for row in rows if row["gate"] == "pass" and row.get("schedule_alone") is not None]
    if not shown:
        return ["Not measured."]
    header = ["case", "threads", "clock", "beside", "ours s", "theirs s", "ratio", "without sampling"]
    header += ["their sampling free", "spread", "ours MiB", "ours / theirs"]
    body = []
    for row in shown:
        alone = row["schedule_alone"]
        seconds, ratio, others, spread = _figures(alone)
        known = alone["memory_ratio"] is not None
        memory = [mib(alone["ours"]["peak_bytes"]), f"{alone['memory_ratio']:.2f}"] if known else ["-", "-"]
        body.append([*_case(row), row["clock"], row["opponent"], *seconds, ratio, *others, spread, *memory])
    return [ALONE, table(header, body)]


def _memory(rows: Sequence[Row]) -> str:
    shown = [row for row in rows if row["gate"] == "pass" and row["memory_ratio"] is not None]
    if not shown:
        return "Not measured: this needs Linux and a writable clear_refs."
    header = ["case", "threads", "beside", "ours MiB", "theirs MiB", "ours / theirs", "ours over models", "theirs"]
    body = [
        [
            *_case(row),
            row["opponent"],
            mib(row["ours"]["peak_bytes"]),
            mib(row["theirs"]["peak_bytes"]),
            f"{row['memory_ratio']:.2f}",
            mib(row["ours"]["peak_over_loaded_bytes"]),
            mib(row["theirs"]["peak_over_loaded_bytes"]),
        ]
        for row in shown
    ]
    return table(header, body)


def _limits(rows: Sequence[Row]) -> str:
    shown = [row for row in rows if row["gate"] == "pass"]
    phases = list(dict.fromkeys(phase for row in shown for phase in row["limit"]["share"]))
    header = ["case", "threads", "large product GFLOP/s", "GFLOP a step", *phases]
    body = [
        [
            *_case(row),
            f"{row['limit']['flops_per_s'] / 1e9:.0f}",
            f"{sum(row['limit']['flops'].values()) / 1e9:.0f}",
            *(f"{row['limit']['share'][phase]:.0%}" for phase in phases),
        ]
        for row in shown
    ]
    return table(header, body)


def _phases(rows: Sequence[Row]) -> list[str]:
    shown = [row for row in rows if row["gate"] == "pass"]
    blocks = []
    for opponent in dict.fromkeys(row["opponent"] for row in shown):
        mine = [row for row in shown if row["opponent"] == opponent]
        sides = [(row, side, seconds) for row in mine for side, seconds in _sides(row)]
        names = list(dict.fromkeys(phase for _, _, seconds in sides for phase in seconds))
        body = [[*_case(row), side, *(_phase(seconds, name) for name in names)] for row, side, seconds in sides]
        blocks += [f"### Beside {opponent}", table(["case", "threads", "side", *names], body)]
    return blocks


def _sides(row: Row) -> list[tuple[str, dict[str, float]]]:
    """Seconds by phase of every side of a row."""
    alone = row.get("schedule_alone")
    own = {"ours": row["ours"]} | ({} if alone is None else {"schedule alone": alone["ours"]})
    return [(side, found["phases_s"]) for side, found in (own | {row["opponent"]: row["theirs"]}).items()]


def _phase(seconds: dict[str, float], name: str) -> str:
    return f"{seconds[name]:.2f}" if name in seconds else "-"


def _errors(rows: Sequence[Row]) -> str:
    """A line for each side and model: a gate is passed once a run for all cases of a model."""
    found: dict[tuple[str, ...], list[str]] = {}
    names: list[str] = []
    for row in rows:
        for side, errors in row["error"].items():
            names += [name for name in errors if name not in names]
            found[row["config"]["model"], side, row["commit"]] = [f"{errors[name]:.0e}" for name in errors]
    return table(["model", "side", "commit", *names], [[*key, *values] for key, values in found.items()])
