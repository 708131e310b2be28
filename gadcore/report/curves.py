"""Which curves a report shows, in which groups, and how each one is read. Keys that are not named here get a chart
of their own in the last group, so a new figure of the engine's needs no change in this file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gadcore.memory.holdings import NEEDS
from gadcore.record.tracking import Row
from gadcore.report.charts import Chart, Series
from gadcore.report.svg import Point

STAGE_KEYS = {"step", "stage_step", "stage_steps"}


@dataclass(frozen=True)
class Group:
    """A section of charts. absent: titles of the charts for which the run has no figure."""

    key: str
    title: str
    about: str
    charts: Sequence[Chart]
    absent: Sequence[str]


@dataclass(frozen=True)
class Spec:
    """A chart to come: (key of metrics.jsonl, name) per series; the rest is as in Chart.

    per: figures are shown divided by it, for example bytes as GiB.
    """

    title: str
    about: str
    series: Sequence[tuple[str, str]]
    spread: str = ""
    unit: str = ""
    guides: Sequence[tuple[float, str]] = ()
    log: bool = False
    zero: bool = False
    stacked: bool = False
    per: float = 1.0


LEARNING = (
    Spec(
        "Discriminator accuracy",
        "Share of (teacher, student) pairs in which the teacher's response scores higher. Healthy: above one half and "
        "below 1. Pinned at 100 %: no gradient between samples; at 50 %: rewards are noise. Where the held-out line "
        "(curriculum.every) stays far below the other one, it learns its texts by heart.",
        [("discriminator/accuracy", "training batches"), ("heldout/accuracy", "held-out prompts"),
         ("heldout/train_accuracy", "training batches since the look before")], unit="%",
        guides=[(0.5, "guessing")],
    ),
    Spec(
        "Discriminator margin",
        "Mean score of the teacher's response minus the student's. Healthy: grows in the warmup, then levels off or "
        "shrinks as the student catches up. A margin that keeps growing says that the student falls behind.",
        [("discriminator/margin", "margin")], guides=[(0.0, "no difference")],
    ),
    Spec(
        "Reward",
        "Mean score of the student's samples, with the spread inside a group around it. The discriminator moves, so "
        "the level can drift either way; only a sudden jump or collapse is a warning.",
        [("reward/mean", "mean")], spread="reward/std",
    ),
    Spec(
        "Reward spread",
        "Standard deviation of the reward inside a group: what the student learns from. Near zero, there is nothing "
        "left to choose between.",
        [("reward/std", "within-group std")], zero=True,
    ),
    Spec(
        "Fresh discriminator",
        "Accuracy of a discriminator that is trained anew at every measurement of the convergence rule: on pairs that "
        "it has not seen, and on those it was trained on. Healthy: the first falls towards one half as the student "
        "comes near the teacher; a rise means that the student moves away again.",
        [("convergence/accuracy", "unseen pairs"), ("convergence/train_accuracy", "its training pairs")], unit="%",
        guides=[(0.5, "guessing")],
    ),
    Spec(
        "KL to the reference",
        "How far the student has moved from where the GAD stage began. A slow rise is normal; a steep one means that "
        "the learning rate is too high.",
        [("student/kl", "KL")], zero=True,
    ),
)  # fmt: skip
PREFERENCE = (
    Spec(
        "Preference margin",
        "How much more probable than at the start the teacher's responses have become beside the snapshot's, "
        "times beta. Healthy: grows, and levels off. Where both sides fall, the student unlearns more than it learns.",
        [("preference/margin", "margin"), ("preference/teacher", "teacher"), ("preference/student", "snapshot")],
        guides=[(0.0, "as at the start")],
    ),
    Spec(
        "Preference accuracy",
        "Share of the pairs in which the teacher's response has gained more than the snapshot's.",
        [("preference/accuracy", "accuracy")], unit="%", guides=[(0.5, "as at the start")],
    ),
    Spec(
        "Preference loss",
        "0.693 is the start. Near zero means that no pair has a gradient any more.",
        [("preference/loss", "loss")], guides=[(0.6931, "start")],
    ),
)  # fmt: skip
LENGTHS = (
    Spec(
        "Response length",
        "Mean tokens of a response. Healthy: the student's line moves towards the teacher's.",
        [("length/student", "student"), ("length/teacher", "teacher")], zero=True,
    ),
    Spec(
        "Length ratio",
        "Student's mean length over the teacher's. Far from 1, or drifting away from it, asks for a look at the "
        "responses.",
        [("length/ratio", "student / teacher")], guides=[(1.0, "same length")],
    ),
    Spec(
        "Responses cut",
        "Share of samples that hit the length limit. A rising share means that the student does not learn to end.",
        [("length/cut_share", "cut")], unit="%", zero=True,
    ),
    Spec(
        "Reward and length",
        "Correlation of reward and length over the samples of a step. Beyond ±0.5 the student is mostly rewarded for "
        "length.",
        [("reward/length_corr", "correlation")], guides=[(0.5, ""), (0.0, "none"), (-0.5, "")],
    ),
    Spec(
        "Reward and end marker",
        "Correlation of reward and whether a sample ended by itself, inside groups, in steps that have both kinds. "
        "Beyond ±0.8 the end marker says almost all about the reward.",
        [("reward/finished_corr", "correlation")], guides=[(0.8, ""), (0.0, "none"), (-0.8, "")],
    ),
    Spec(
        "Reward of an ending",
        "Mean reward of samples that ended by themselves minus that of samples that were cut, inside groups.",
        [("reward/finished_gap", "finished − cut")], guides=[(0.0, "no difference")],
    ),
    Spec(
        "Repetition",
        "Share of the runs of four words of a sample that were there before in the same sample. Above 25 % the samples "
        "go round in circles.",
        [("samples/repetition", "repeated")], unit="%", zero=True,
    ),
)  # fmt: skip
OPTIMISATION = (
    Spec(
        "Student cross-entropy",
        "On the teacher's text, in the supervised stages. It should fall, fast at first.",
        [("student/ce", "training batches"), ("heldout/ce", "held-out responses")],
    ),
    Spec(
        "Student policy loss",
        "With one update per batch it stays near zero by construction; read the reward instead.",
        [("student/loss", "loss")],
    ),
    Spec(
        "Discriminator loss",
        "Bradley-Terry loss; 0.693 is guessing. Near zero means that the discriminator has won.",
        [("discriminator/loss", "loss")], guides=[(0.6931, "guessing")],
    ),
    Spec(
        "Gradient norms",
        "Before clipping. Single peaks are normal; a steady climb is not.",
        [("student/grad_norm", "student"), ("discriminator/grad_norm", "discriminator")], log=True,
    ),
    Spec(
        "Entropy",
        "Of the student's next-token distribution. A slow fall is normal; a collapse means that samples of a group "
        "become alike.",
        [("student/entropy", "entropy")], zero=True,
    ),
    Spec(
        "Clipped tokens",
        "Share of tokens whose probability ratio met the clip. Zero with one update per batch.",
        [("student/clip_fraction", "clipped")], unit="%", zero=True,
    ),
    Spec(
        "Largest probability ratio",
        "New over old probability of a sampled token. Exactly 1 with one update per batch.",
        [("student/ratio_max", "largest ratio")],
    ),
)  # fmt: skip
MACHINERY = (
    Spec(
        "Sampler against trainer",
        "Absolute difference of the log-probability of the sampled tokens. A mean above 0.01 means that the two do not "
        "run the same model.",
        [("sampler/logprob_diff_mean", "mean"), ("sampler/logprob_diff_max", "max")], log=True,
        guides=[(1e-2, "0.01")],
    ),
    Spec(
        "Sampler's KL from the trainer",
        "Estimated (k3) on the sampled tokens, before any importance weight. Near zero where both compute alike; a "
        "climb means that the student learns from another policy's samples.",
        [("sampler/kl", "KL")], log=True,
    ),
    Spec(
        "Tokens that the two see differently",
        "Share of the sampled tokens whose log-probability differs by more than 0.1, and of those whose importance "
        "weight met algorithm.importance_cap, where there is one.",
        [("sampler/far_share", "differ by 0.1"), ("sampler/capped_share", "capped")], unit="%", zero=True,
    ),
    Spec(
        "Seconds per step",
        "Where the time goes. A phase that grows from step to step is worth a look.",
        [("time/rollout", "rollout"), ("time/discriminator", "discriminator"), ("time/student", "student"),
         ("time/checkpoint", "checkpoint"), ("time/evaluation", "evaluation")], stacked=True, unit="s",
    ),
    Spec(
        "Seconds per step, the shorter phases",
        "The optimizer steps of both models, and the pass of the reference policy.",
        [("time/discriminator_update", "discriminator's update"), ("time/student_update", "student's update"),
         ("time/reference", "reference")], stacked=True, unit="s",
    ),
    Spec(
        "Tokens per second",
        "In each phase. Steady is healthy; a slow fall hints at growing responses or memory pressure.",
        [("perf/rollout_tokens_per_s", "rollout"), ("perf/discriminator_tokens_per_s", "discriminator"),
         ("perf/student_tokens_per_s", "student")], zero=True,
    ),
    Spec(
        "Tokens per step",
        "Sampled by the student, and read by each model in training, prompts included.",
        [("tokens/sampled", "sampled"), ("tokens/discriminator", "discriminator"), ("tokens/student", "student")],
        zero=True,
    ),
)  # fmt: skip
STATES = tuple(NEEDS)
HARDWARE = (
    Spec(
        "Memory held",
        "By models, optimizers, sampler and process, in each state of a step. States follow each other: the run needs "
        "the largest, not the sum.",
        [(f"memory/{state}_held", state) for state in STATES], zero=True, unit="GiB", per=2**30,
    ),
    Spec(
        "Peak memory",
        "The most that was resident while the run was in a state, what forward and backward need included. A climb "
        "from step to step is a leak.",
        [(f"memory/{state}_peak", state) for state in STATES], zero=True, unit="GiB", per=2**30,
    ),
    Spec(
        "Moving",
        "Seconds of a step in which holdings left the device or came back, and nothing was computed.",
        [("memory/moving_s", "moving")], zero=True, unit="s",
    ),
    Spec(
        "Resident memory of the process",
        "The largest seen in a step.",
        [("machine/rss_gib", "resident")], zero=True, unit="GiB",
    ),
    Spec(
        "Memory of the GPU",
        "In use on the whole device, the largest seen in a step.",
        [("machine/gpu_memory_used_gib", "in use")], zero=True, unit="GiB",
    ),
    Spec(
        "CPU load",
        "CPU seconds of the process per second: how many cores were at work. Far below run.threads on a machine "
        "without a GPU, something else has the cores.",
        [("machine/cpu_load", "cores")], zero=True,
    ),
    Spec(
        "GPU utilisation",
        "Share of the time in which a kernel ran, not of the arithmetic that the GPU could do. Gaps are the CPU's.",
        [("machine/gpu_util", "busy")], unit="%", zero=True,
    ),
    Spec(
        "Clock of the GPU",
        "Of its multiprocessors. It falls where the power or the temperature is at its limit.",
        [("machine/gpu_sm_clock_mhz", "SM clock")], unit="MHz",
    ),
    Spec(
        "Clocks held down",
        "Share of the looks at which the GPU was at its limit of power or temperature; the log names the reason.",
        [("machine/gpu_throttled_share", "throttled")], unit="%", zero=True,
    ),
    Spec(
        "Power of the GPU",
        "Mean over a step.",
        [("machine/gpu_power_w", "power")], unit="W", zero=True,
    ),
    Spec(
        "Energy per step",
        "Of the GPU, and of the CPU packages with their memory, where the system lets a run read their counters.",
        [("machine/gpu_energy_j", "GPU"), ("machine/energy_j", "CPU")], stacked=True, unit="J",
    ),
    Spec(
        "Energy per sampled token",
        "All energy of a step, training included, over the tokens that the student sampled in it.",
        [("energy/j_per_sampled_token", "energy")], unit="J", zero=True,
    ),
    Spec(
        "Major page faults",
        "Of a step: waits for a disk. More than a few in every step mean that the memory does not suffice.",
        [("machine/major_faults", "major faults")], zero=True,
    ),
    Spec(
        "Minor page faults",
        "Of a step: fresh pages of memory. Healthy: few after the first steps, as memory is used again.",
        [("machine/minor_faults", "minor faults")], zero=True,
    ),
)  # fmt: skip
SECTIONS = (
    ("learning", "Does it learn", "The contest between student and discriminator. Every chart runs over the steps of "
     "all stages; move over one, or use the arrow keys on it, to read all of them at one step.", LEARNING),
    ("preference", "Preference", "SODA: the teacher's responses against those of one snapshot of the student.",
     PREFERENCE),
    ("lengths", "Lengths, endings, repetition", "The usual ways in which a reward is gamed.", LENGTHS),
    ("optimisation", "Optimisation", "Losses, gradients and the sharpness of the student.", OPTIMISATION),
    ("machinery", "Machinery", "Whether sampler and trainer agree, and what the time is spent on.", MACHINERY),
    ("hardware", "Hardware", "What the run asks of the machine.", HARDWARE),
)  # fmt: skip
# Sums of what the charts show.
SUMS = {"time/total", "tokens/trained"}
NAMED = SUMS | {key for _, _, _, specs in SECTIONS for spec in specs for key, _ in spec.series}


def groups_of(rows: Sequence[Row]) -> list[Group]:
    """The groups with their charts, from rows of metrics.jsonl; a group without any figure is left out."""
    groups = []
    for key, title, about, specs in SECTIONS:
        made = [(spec, _chart(f"{key}-{i}", spec, rows)) for i, spec in enumerate(specs)]
        charts = [chart for _, chart in made if chart]
        if charts:
            groups.append(Group(key, title, about, charts, [spec.title for spec, chart in made if not chart]))
    others = sorted(
        {
            key for row in rows for key, value in row.items()
            if isinstance(value, int | float) and key not in NAMED and key not in STAGE_KEYS
        }
    )  # fmt: skip
    charts = [
        Chart(f"other-{i}", key, "As it is in metrics.jsonl.", [Series(key, _points(rows, key))])
        for i, key in enumerate(others)
    ]
    if charts:
        groups.append(Group("other", "Other figures", "What else metrics.jsonl holds.", charts, []))
    return groups


def _chart(key: str, spec: Spec, rows: Sequence[Row]) -> Chart | None:
    spread = [row.get(spec.spread, 0.0) / spec.per for row in rows if spec.series[0][0] in row] if spec.spread else None
    series = [Series(name, _points(rows, source, spec.per), spread) for source, name in spec.series]
    drawn = [s for s in series if s.points]
    if not drawn:
        return None
    return Chart(key, spec.title, spec.about, drawn, spec.unit, spec.guides, spec.log, spec.zero, spec.stacked)


def _points(rows: Sequence[Row], key: str, per: float = 1.0) -> list[Point]:
    return [(row["step"], row[key] / per) for row in rows if key in row]
