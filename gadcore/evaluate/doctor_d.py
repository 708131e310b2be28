"""What is wrong with a run's discriminator, in words, from the rows of its last held-out evaluation and its metrics.

Every check is a function of Evidence, which holds no model: the report makes the same ones as the command doctor-d,
which adds what only the model can say.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, Literal

from gadcore.measure.intervals import Estimate
from gadcore.measure.likeness import words
from gadcore.measure.reliability import Calibration, Saturation, calibration, saturation
from gadcore.measure.surface import Baseline, Pairs, Side, accuracy_of, baselines, lean

Status = Literal["ok", "note", "wrong"]
# Steps at the end of a run whose training accuracy is compared with the held-out one.
TAIL = 20
SURE, SATURATED_WEIGHT = 0.95, 0.05
LEANING, LEANING_SAMPLES = 0.6, 24
ASYMMETRY = 0.1
# A training accuracy so far above the held-out one, of a discriminator that has learned its texts at all.
MEMORISED, LEARNED = 0.1, 0.8
NOISE = 0.5
HOT = 3.0
# Of a standard deviation: what rounding leaves between two passes.
SAME = 1e-2
# What a chat template writes, and no answer does: special tokens, the header of a turn.
_ARTEFACT = re.compile(
    r"<\|[^|>]*\|>|</?s>|\[/?INST\]|<(start|end)_of_turn>|^\s*(assistant|user|system)\b\s*[:\n]", re.I
)


@dataclass(frozen=True)
class Finding:
    """check: what was looked at. found: a sentence. mend: settings to change, "" where all is well."""

    check: str
    status: Status
    found: str
    mend: str = ""


@dataclass(frozen=True)
class FromModel:
    """What only the model says; all but noise over the standard deviation of scores.

    identical: largest difference of the scores of one text as the teacher's and as the student's. end_marker: mean
    absolute change of a teacher's score where its end marker is taken off, or given. trained, held_out: mean score of
    teachers' texts that were trained on, and that were not. noise: correlation of two fresh discriminators' rewards
    inside groups; None: not asked for.
    """

    identical: float
    end_marker: float
    trained: float | None = None
    held_out: float | None = None
    noise: float | None = None


@dataclass(frozen=True)
class Evidence:
    """pairs: of the last evaluation, with D's scores. trained: D's accuracy on the latest training batches, before its
    updates; None without any. evaluation: its name. model: see FromModel."""

    pairs: Sequence[Pairs]
    evaluation: str = ""
    trained: float | None = None
    model: FromModel | None = None
    surfaces: Mapping[str, Baseline] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        evaluations: Mapping[str, Sequence[Mapping[str, Any]]],
        metrics: Sequence[Mapping[str, Any]],
        model: FromModel | None = None,
    ) -> Evidence | None:
        """From the rows of a run's evaluations by name, in their order, and of metrics.jsonl; None where no evaluation
        holds samples with D's scores."""
        for name, rows in reversed(list(evaluations.items())):
            pairs = pairs_of(rows)
            if pairs:
                seen = [row["discriminator/accuracy"] for row in metrics if "discriminator/accuracy" in row]
                trained = fmean(seen[-TAIL:]) if seen else None
                return cls(pairs, name, trained, model, baselines(pairs))
        return None

    def with_model(self, model: FromModel) -> Evidence:
        return replace(self, model=model)

    @property
    def margins(self) -> list[list[float]]:
        return [of.margins for of in self.pairs]

    @property
    def accuracy(self) -> Estimate:
        """D's, over prompts."""
        return accuracy_of(self.margins)

    @property
    def memorised(self) -> bool:
        """Whether D tells what it was trained on better than what it was not, beyond the noise of the latter."""
        own = self.accuracy
        return self.trained is not None and self.trained > max(own.mean + MEMORISED, own.high, LEARNED)

    @property
    def calibration(self) -> Calibration:
        return calibration([margin for of in self.margins for margin in of])

    @property
    def saturation(self) -> Saturation:
        return saturation([of.teacher_score for of in self.pairs], [of.scores for of in self.pairs])


def pairs_of(rows: Sequence[Mapping[str, Any]]) -> list[Pairs]:
    """Of the rows of an evaluation; [] where one of them lacks its samples, or D's finite scores of them."""
    found = []
    for row in rows:
        samples = row.get("samples") or []
        teacher, scores = row.get("teacher_score"), [sample.get("score") for sample in samples]
        known = [score for score in (teacher, *scores) if score is not None and math.isfinite(score)]
        if not samples or len(known) <= len(samples):
            return []
        sides = tuple(Side(sample["text"], sample["finished"]) for sample in samples)
        found.append(Pairs(Side(row["teacher"], row.get("teacher_finished", True)), sides, known[0], tuple(known[1:])))
    return found


def examine(evidence: Evidence) -> list[Finding]:
    """Every check, in order."""
    return [finding for check in CHECKS if (finding := check(evidence)) is not None]


def verdict(findings: Sequence[Finding]) -> str:
    """One sentence on all of them."""
    wrong = [finding.check for finding in findings if finding.status == "wrong"]
    if not wrong:
        return "Nothing that these checks see is wrong with the discriminator."
    return f"The discriminator's rewards are not to be trusted: {', '.join(wrong)}."


def share(estimate: Estimate) -> str:
    return f"{100 * estimate.mean:.0f} % [{100 * estimate.low:.0f}, {100 * estimate.high:.0f}]"


def _identical(e: Evidence) -> Finding | None:
    if e.model is None:
        return None
    if e.model.identical < SAME:
        return Finding("identical text", "ok", "One text gets one score, whoever wrote it.")
    return Finding(
        "identical text",
        "wrong",
        f"One text as the teacher's and as the student's gets scores that differ by up to "
        f"{e.model.identical:.2g} standard deviations.",
        "the chat template writes the two sides differently: look at data.template_arguments and discriminator.model",
    )


def _end_marker(e: Evidence) -> Finding:
    teacher = fmean(of.teacher.finished for of in e.pairs)
    student = fmean(fmean(side.finished for side in of.samples) for of in e.pairs)
    said = f"{100 * teacher:.0f} % of the teacher's responses end by themselves, {100 * student:.0f} % of the student's"
    if e.model is not None:
        said += f"; taking the marker off moves a score by {e.model.end_marker:.1f} standard deviations"
    if abs(teacher - student) <= ASYMMETRY:
        return Finding("end marker", "ok", f"{said}.")
    mend = (
        "the teacher's text has no end marker where it is cut: raise data.max_response_tokens, or leave such rows out "
        'by data.long_response = "drop"'
        if teacher < student
        else "the student does not end: raise data.max_response_tokens, or teach it longer by cross-entropy "
        "(schedule.sft_epochs, schedule.warmup_epochs)"
    )
    return Finding("end marker", "wrong", f"{said}: D can tell them by that alone.", mend)


def _template(e: Evidence) -> Finding:
    looks: dict[str, Callable[[str], bool]] = {
        "hold what a chat template writes (special tokens, a turn's header)": lambda text: bool(_ARTEFACT.search(text)),
        "begin with white space": lambda text: text[:1].isspace(),
        "hold a block of reasoning": lambda text: "<think>" in text or "</think>" in text,
    }
    for what, has in looks.items():
        teacher = fmean(has(of.teacher.text) for of in e.pairs)
        student = fmean(fmean(has(side.text) for side in of.samples) for of in e.pairs)
        if abs(teacher - student) > ASYMMETRY:
            mend = (
                'data.reasoning = "strip"'
                if "reasoning" in what
                else "clean the rows of data.train, or make prompts end as the template's turns do "
                "(data.template_arguments)"
            )
            said = f"{100 * teacher:.0f} % of the teacher's responses and {100 * student:.0f} % of the student's {what}"
            return Finding("template", "wrong", f"{said}: D can tell them by that alone.", mend)
    return Finding("template", "ok", "Neither side holds traces of a chat template that the other one lacks.")


_MEND = {
    "length": "hold lengths by algorithm.length_debias = fit, and look at data.max_response_tokens",
    "end marker": "see the end marker above",
    "first word": "responses begin differently: look at a few of both, at data.template_arguments, and teach the "
    "opening by cross-entropy (schedule.sft_epochs)",
    "last word": "responses end differently: look at a few of both, and at data.max_response_tokens",
}


def _surfaces(e: Evidence) -> Finding:
    if not e.surfaces:
        return Finding(
            "surface", "note", f"{len(e.pairs)} held-out prompts are too few to compare D with its baselines."
        )
    own, best = e.accuracy, max(_MEND, key=lambda name: e.surfaces[name].accuracy.mean)
    told = ", ".join(f"{name} {share(found.accuracy)}" for name, found in e.surfaces.items())
    said = f"What one plain thing of a text tells apart: {told}; D itself {share(own)}."
    found = e.surfaces[best]
    alike = _agreement(e, found)
    if found.accuracy.low > 0.6 and found.accuracy.mean > own.mean - 0.05 and alike > LEANING:
        equal = [name for name in _MEND if e.surfaces[name].accuracy.mean >= found.accuracy.mean]
        told = f"{said} D does no better than {' or '.join(equal)} alone, and its margins go with it "
        told += f"(correlation {alike:.2f})."
        return Finding("surface", "wrong", told, _MEND[best])
    if e.surfaces["bag of words"].accuracy.mean > own.high:
        mend = "train D further (algorithm.discriminator_steps, discriminator.lr), or take a larger discriminator.model"
        return Finding("surface", "wrong", f"{said} A bag of words tells more than D does.", mend)
    return Finding("surface", "ok", said)


def _agreement(e: Evidence, baseline: Baseline) -> float:
    """Correlation of D's margins with the baseline's, over all pairs; 0 where one does not vary."""
    ours = [margin for of in e.margins for margin in of]
    theirs = [margin for of in baseline.margins for margin in of]
    mine, other = (fmean(values) for values in (ours, theirs))
    cross = sum((a - mine) * (b - other) for a, b in zip(ours, theirs, strict=True))
    size = math.sqrt(sum((a - mine) ** 2 for a in ours) * sum((b - other) ** 2 for b in theirs))
    # Margins that are all alike say the same of every pair: which D that does no better does too.
    return cross / size if size > 1e-12 else 1.0


def _length(e: Evidence) -> Finding | None:
    found = lean(e.pairs, lambda side: math.log1p(len(words(side.text))))
    if found is None:
        return None
    said = f"Among the samples of a prompt D's score and the length have a correlation of {found:+.2f}."
    if abs(found) < LEANING or sum(len(of.samples) for of in e.pairs) < LEANING_SAMPLES:
        return Finding("length", "ok", said)
    way = "long" if found > 0 else "short"
    mend = "algorithm.length_debias = fit, a larger algorithm.kl_coef, fewer GAD steps"
    return Finding("length", "wrong", f"{said} The student is paid for {way} responses.", mend)


def _held_out(e: Evidence) -> Finding:
    own = e.accuracy
    said = f"D tells {share(own)} of the pairs of {own.n} held-out prompts apart ({e.evaluation or 'last evaluation'})."
    if own.low > 0.5:
        return Finding("accuracy", "ok", said)
    mend = (
        "more warmup of D (schedule.warmup_epochs, algorithm.discriminator_steps), a higher discriminator.lr, more "
        "held-out rows to see it (data.eval_rows, data.eval_samples); where the student is as good as the teacher, stop"
    )
    if e.memorised:
        mend = "it has learned its texts by heart, see below"
    return Finding("accuracy", "wrong", f"{said} That is no more than guessing: rewards are noise.", mend)


def _memorised(e: Evidence) -> Finding | None:
    if e.trained is None:
        return None
    own = e.accuracy
    said = f"On its latest training batches D told {100 * e.trained:.0f} % apart, on held-out prompts {share(own)}."
    if e.model is not None and e.model.trained is not None and e.model.held_out is not None:
        gap = e.model.trained - e.model.held_out
        said += f" Teacher's texts that it was trained on score {gap:+.1f} standard deviations above others."
    if not e.memorised:
        return Finding("memorised", "ok", said)
    mend = (
        "it knows its teacher's texts by heart: more rows, discriminator.label_smoothing = 0.1, fewer updates "
        "(algorithm.discriminator_steps, schedule.warmup_epochs), a lower discriminator.lr, a larger batch_size"
    )
    return Finding("memorised", "wrong", said, mend)


def _calibrated(e: Evidence) -> Finding:
    found = e.calibration
    hot = f"would be calibrated at margins divided by {found.temperature:.1f}"
    if found.temperature == 0:
        hot = "is never wrong"
    elif found.temperature > 100:
        hot = "would do as well with margins of 0"
    said = (
        f"D is on average {100 * found.error:.0f} points surer or less sure than it is right, and {hot} "
        f"(BT loss {found.nll:.3f}, guessing .693)."
    )
    if found.temperature < HOT or found.nll < math.log(2):
        return Finding("calibration", "ok", said)
    mend = "discriminator.label_smoothing = 0.1, discriminator.score_l2 = 0.01, a lower discriminator.lr"
    return Finding("calibration", "wrong", f"{said} It is sure where it is wrong.", mend)


def _saturated(e: Evidence) -> Finding:
    found, own = e.saturation, e.accuracy
    said = f"Mean margin {found.margin:.2f}; a pair's gradient has {100 * found.weight:.1f} % of its greatest weight"
    if found.spread is not None:
        said += f"; scores inside a group spread by {found.spread:.3f}"
    if (found.weight >= SATURATED_WEIGHT or own.mean < SURE) and (found.flat or 0.0) < 0.5:
        return Finding("saturation", "ok", f"{said}.")
    mend = (
        "discriminator.label_smoothing = 0.1, discriminator.margin_cap = 4 or discriminator.score_l2 = 0.01; teach the "
        "student more by cross-entropy before the GAD stage (schedule.sft_epochs), or update D less often "
        "(algorithm.discriminator_every)"
    )
    return Finding("saturation", "wrong", f"{said}: D has won, and learns no more.", mend)


def _noise(e: Evidence) -> Finding | None:
    if e.model is None or e.model.noise is None:
        return None
    said = (
        "Two discriminators of other seeds, trained on the same held-out pairs, give the samples of a prompt rewards "
        f"with a correlation of {e.model.noise:.2f}."
    )
    if e.model.noise >= NOISE:
        return Finding("reward noise", "ok", said)
    mend = (
        "most of a reward is the seed's: algorithm.advantage_std_floor = 0.1, more samples (rollout.group_size), a "
        "larger schedule.batch_size, more rows"
    )
    return Finding("reward noise", "wrong", said, mend)


CHECKS: tuple[Callable[[Evidence], Finding | None], ...] = (
    _identical, _end_marker, _template, _held_out, _surfaces, _length, _memorised, _saturated, _calibrated, _noise,
)  # fmt: skip
