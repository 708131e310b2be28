"""The findings on a discriminator as lines and as a section of the report, and doctor-d.json, what the model said."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from markupsafe import Markup
from pydantic import TypeAdapter

from gadcore.evaluate.doctor_d import Evidence, Finding, FromModel, examine, verdict
from gadcore.files import write_whole
from gadcore.record.html import render
from gadcore.record.reading import Finite, fitting, read_json
from gadcore.record.run_folder import DOCTOR_D
from gadcore.record.tracking import Row

_MARKS = {"ok": "  ", "note": "- ", "wrong": "! "}
_WORDS = {"ok": "fine", "note": "not known", "wrong": "wrong"}


@dataclass(frozen=True)
class _Model:
    """FromModel, as it may be read."""

    identical: Finite
    end_marker: Finite
    trained: Finite | None = None
    held_out: Finite | None = None
    noise: Finite | None = None


@dataclass(frozen=True)
class _Kept:
    evaluation: str
    model: _Model


_KEPT = TypeAdapter(_Kept)


def write(folder: Path, evaluation: str, model: FromModel) -> None:
    """evaluation: whose samples the model was asked about."""
    content = {"evaluation": evaluation, "model": asdict(model)}
    write_whole(folder / DOCTOR_D, json.dumps(content, indent=1) + "\n")


def read(folder: Path) -> tuple[str, FromModel] | None:
    """(evaluation, what the model said of it); None where doctor-d did not look. UserError where that is damaged."""
    path = folder / DOCTOR_D
    if not path.is_file():
        return None
    advice = "delete it, and run doctor-d again"
    kept = fitting(_KEPT, read_json(path, advice), path, advice)
    return kept.evaluation, FromModel(**asdict(kept.model))


def lines(findings: Sequence[Finding]) -> Iterator[str]:
    """For a terminal."""
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        yield f"{_MARKS[finding.status]}{finding.check:{width}}  {finding.found}"
        if finding.mend:
            yield f"  {'':{width}}  mend: {finding.mend}"
    yield ""
    yield verdict(findings)


_SECTION = """\
<section aria-labelledby="discriminator">
  <h2 id="discriminator">Discriminator</h2>
  <p class="lead">{{ verdict }}</p>
  <div class="card scroll" tabindex="0" role="region" aria-label="What was looked at">
  <table class="told">
    <caption>On the samples of the last held-out evaluation, with 95 % intervals over prompts.{{ more }}</caption>
    <thead><tr><th scope="col">Check</th><th scope="col">Is it right?</th><th scope="col">What was seen</th>\
<th scope="col">What to change</th></tr></thead>
    <tbody>
    {% for f in findings %}
    <tr><th scope="row">{{ f.check }}</th><td>{{ words[f.status] }}</td><td>{{ f.found }}</td><td>{{ f.mend }}</td></tr>
    {% endfor %}
    </tbody>
  </table>
  </div>
</section>
"""


def doctor_d_section(folder: Path, evaluations: Mapping[str, Sequence[Row]], metrics: Sequence[Row]) -> Markup | None:
    """The section of the report; None for a run whose evaluations hold no samples with a discriminator's scores."""
    evidence = Evidence.of(evaluations, metrics)
    if evidence is None:
        return None
    kept = read(folder)
    more = " The command doctor-d asks the model itself, too."
    if kept is not None and kept[0] == evidence.evaluation:
        evidence, more = evidence.with_model(kept[1]), ""
    findings = examine(evidence)
    return render(_SECTION, verdict=verdict(findings), findings=findings, words=_WORDS, more=more)
