"""python -m gadcore.run doctor-d [RUN_FOLDER] [--noise]: what is wrong with a run's discriminator, and what mends it.

From the samples and scores of the run's last held-out evaluation, its metrics, and the discriminator that it left, or
that of its newest checkpoint. --noise trains two more discriminators on the held-out pairs, which takes as long as two
measurements of the convergence rule (convergence.steps).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING

from gadcore.config import loading
from gadcore.config.settings import Config, FreshSettings
from gadcore.errors import UserError
from gadcore.evaluate.doctor_d import Evidence, FromModel, examine
from gadcore.evaluate.doctor_d_page import lines, write
from gadcore.files import temporary
from gadcore.record.evaluations import paths, read
from gadcore.record.run_folder import CONFIG, LATEST, RunFolder
from gadcore.record.tracking import Row, scan
from gadcore.text import say

if TYPE_CHECKING:
    from gadcore.data.groups import Group, Response
    from gadcore.models.discriminator import Discriminator
    from gadcore.train.inputs import Inputs

# Rows that the model is asked about, of those trained on and of those held out.
ROWS = 64


def main(arguments: Sequence[str], prepare: Callable[[Config], None]) -> tuple[Path, bool]:
    """Prints the findings and writes doctor-d.json; (the run's folder, whether something is wrong).

    prepare: called with the run's settings before torch is loaded. Raises UserError where there is nothing to examine.
    """
    names = [argument for argument in arguments if argument != "--noise"]
    if len(names) > 1 or any(name.startswith("-") for name in names):
        raise UserError(f"doctor-d takes a run folder, and --noise, not {' '.join(arguments)}")
    folder = Path(names[0]).expanduser() if names else LATEST
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} is no run folder (it has no {CONFIG}): give the folder of a run")
    config = loading.load(["--config", str(folder / CONFIG)])
    evidence = Evidence.of({name: read(path).rows for name, path in paths(folder).items()}, _metrics(folder))
    if evidence is None:
        raise UserError(
            f"{folder} has no held-out evaluation with samples and a discriminator's scores of them: it needs held-out "
            "rows (data.eval), a discriminator (no baseline), and this version of gadcore"
        )
    prepare(config)
    model = _ask(config, folder, evidence, noise="--noise" in arguments)
    write(folder, evidence.evaluation, model)
    findings = examine(evidence.with_model(model))
    for line in lines(findings):
        say(line)
    return folder, any(finding.status == "wrong" for finding in findings)


def _metrics(folder: Path) -> list[Row]:
    path = folder / "metrics.jsonl"
    return scan(path).rows if path.is_file() else []


def _ask(config: Config, folder: Path, evidence: Evidence, *, noise: bool) -> FromModel:
    # Imported only now: torch reads the environment when it is loaded.
    from gadcore.config.device import device_of, quiet
    from gadcore.models.discriminator import Discriminator
    from gadcore.train.inputs import read_inputs

    quiet()
    device = device_of(config)
    inputs = read_inputs(config, ("warmup", "gad"))
    if len(inputs.held_out) != len(evidence.pairs):
        raise UserError(
            f"{folder} was evaluated on {len(evidence.pairs)} held-out rows, data.eval = {config.data.eval} has "
            f"{len(inputs.held_out)} now: put the rows back as they were"
        )
    unit = pstdev([score for of in evidence.pairs for score in (of.teacher_score, *of.scores)]) or 1.0

    def load(path: str, seed: int, lr: float) -> Discriminator:
        return Discriminator.load(
            path,
            config.discriminator.model_copy(update={"lr": lr}),
            student=inputs.student,
            device=device,
            seed=seed,
            micro_batch_tokens=config.schedule.micro_batch_tokens,
        )

    with _directory(folder) as path:
        discriminator = load(path, config.run.seed, config.discriminator.lr)
        held_out, identical, end_marker = _of_teachers(discriminator, inputs.held_out[:ROWS], evidence)
        trained = _teachers(discriminator, inputs.train[:ROWS])
    del discriminator
    correlation = None
    if noise:
        correlation = _noise(config, inputs, evidence, lambda seed: load(_start(config), seed, config.convergence.lr))
    return FromModel(
        identical=identical / unit,
        end_marker=end_marker / unit,
        trained=fmean(trained) / unit,
        held_out=fmean(held_out) / unit,
        noise=correlation,
    )


@contextmanager
def _directory(folder: Path) -> Iterator[str]:
    """The run's discriminator as a model directory: what it left, else that of its newest checkpoint."""
    if (folder / "discriminator" / "config.json").is_file():
        yield str(folder / "discriminator")
        return
    from gadcore.checkpoint import store
    from gadcore.checkpoint.export import export

    newest = store.latest(RunFolder(folder).checkpoints)
    if newest is None:
        raise UserError(f"{folder} has no discriminator and no checkpoint yet: let it finish (--resume auto)")
    place = temporary(folder / "discriminator")
    try:
        export(newest, place, "discriminator")
        yield str(place)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _start(config: Config) -> str:
    """What the discriminator was before training."""
    from gadcore.models.loading import resolve_model

    return resolve_model(config.discriminator_model)


def _of_teachers(
    discriminator: Discriminator, groups: Sequence[Group], evidence: Evidence
) -> tuple[list[float], float, float]:
    """(scores of the teachers' texts, largest difference to their scores as a sample's, mean absolute change where the
    end marker is taken off, or given)."""
    from gadcore.data.groups import Group, Response

    scores, swapped, without = [], [], []
    for group, of in zip(groups, evidence.pairs, strict=False):
        teacher, other = group.teacher, of.samples[0]
        sample = Response(other.text, discriminator.template.response_ids(other.text, finished=other.finished) or (0,),
                          other.finished)  # fmt: skip
        bare = Response(teacher.text, teacher.token_ids, not teacher.finished)
        passed = discriminator.score([Group(group.prompt, teacher, [sample, bare])], backward=False)
        turned = discriminator.score([Group(group.prompt, sample, [teacher, sample])], backward=False)
        scores.append(passed.teacher_scores[0])
        swapped.append(abs(passed.teacher_scores[0] - turned.rewards[0][0]))
        without.append(abs(passed.teacher_scores[0] - passed.rewards[0][1]))
    return scores, max(swapped), fmean(without)


def _teachers(discriminator: Discriminator, groups: Sequence[Group]) -> list[float]:
    from gadcore.data.groups import Group

    made = [Group(group.prompt, group.teacher, [group.teacher]) for group in groups]
    return discriminator.score(made, backward=False).teacher_scores


def _noise(config: Config, inputs: Inputs, evidence: Evidence, make: Callable[[int], Discriminator]) -> float | None:
    """The correlation of measure.noise on the samples of the evaluation."""
    from gadcore.data.groups import Group, Response
    from gadcore.measure.noise import reward_noise

    if min(len(of.samples) for of in evidence.pairs) < 2:
        raise UserError(
            "--noise compares rewards of the samples of a prompt, and this run's evaluation has one each: a run with "
            "--data.eval_samples 8 has more"
        )
    template = inputs.student.template

    def response(text: str, finished: bool) -> Response:
        return Response(text, template.response_ids(text, finished=finished), finished)

    groups = [
        Group(group.prompt, group.teacher, [response(side.text, side.finished) for side in of.samples])
        for group, of in zip(inputs.held_out, evidence.pairs, strict=True)
    ]
    rule = config.convergence
    settings = FreshSettings(steps=rule.steps, batch_size=rule.step_rows, seed=config.run.seed)
    say(f"training two discriminators on {len(groups) // 2} held-out prompts, {rule.steps} steps each")
    return reward_noise(groups, make, settings)
