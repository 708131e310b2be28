"""The table of an evaluation: one section per set, a row per measure, a column per model and per difference.

evaluation.json holds every figure; Markdown and the report's part are made from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from markupsafe import Markup
from pydantic import Field, TypeAdapter

from gadcore.errors import UserError
from gadcore.evaluate.measure import TEACHER, measures_of
from gadcore.measure.figures import Measure
from gadcore.record.html import render
from gadcore.record.reading import Count, Finite, fitting, read_json
from gadcore.text import code
from gadcore.text import markdown as escaped

NAME = "evaluation"
DOMAINS = {"in": "in domain", "out": "out of domain"}


@dataclass(frozen=True)
class TableSection:
    """The table of one set, as text. rows: (measure, cells, better when); a cell per column."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...], str], ...]


@dataclass(frozen=True)
class _Value:
    """A mean or a difference: of a judge without a verdict there is none."""

    mean: Finite | None
    interval: tuple[Finite, Finite] | None
    unparsable: Count = 0


_Values = dict[str, dict[str, _Value]]


@dataclass(frozen=True)
class _Set:
    domain: Literal["in", "out"]
    source: str
    prompts: Count
    results: _Values
    differences: _Values


@dataclass(frozen=True)
class _Evaluation:
    """What a table shows of evaluation.json."""

    models: Annotated[dict[str, str], Field(min_length=1)]
    sets: dict[str, _Set]
    notes: list[str]


_EVALUATION = TypeAdapter(_Evaluation)


def sections_of(evaluation: Mapping[str, Any]) -> list[TableSection]:
    """The tables of evaluation.json's content, in the order of its sets."""
    first, *others = evaluation["models"]
    columns = (TEACHER, first, *others, *(f"{name} − {first}" for name in others))
    sections = []
    for name, found in evaluation["sets"].items():
        rows = []
        for measure in measures_of(found["results"]):
            (key,) = measure.path
            cells = [_cell(measure, found["results"][who].get(key)) for who in (TEACHER, first, *others)]
            cells += [_cell(measure, found["differences"][who].get(key), signed=True) for who in others]
            if any(key in found["results"][who] for who in (TEACHER, first, *others)):
                rows.append((measure.label, tuple(cells), measure.better))
        title = f"{name} ({DOMAINS[found['domain']]}, {found['prompts']} prompts of {found['source']})"
        sections.append(TableSection(title, columns, tuple(rows)))
    return sections


def _cell(measure: Measure, found: Mapping[str, Any] | None, *, signed: bool = False) -> str:
    if found is None:
        return "–"
    text = measure.show(found["mean"], signed)
    # A judge that gave no usable verdict leaves none.
    if found["interval"] is not None:
        low, high = found["interval"]
        text += f" [{measure.show(low, signed)}, {measure.show(high, signed)}]"
        text += " *" if signed and (low > 0 or high < 0) else ""
    if found.get("unparsable"):
        text += f" ({found['unparsable']} unparsable)"
    return text


LEGEND = (
    "Means over responses, then over prompts, with 95 % intervals over prompts; differences are paired by prompt, * "
    "marks those whose interval excludes 0, as some of so many do by chance. Intervals cover the choice of prompts, "
    "not another draw of responses or another training run. The fresh discriminator is trained on one half of the "
    "pairs and asked about the other: 50 % where it cannot tell student from teacher, which with few prompts or steps "
    "says more about it than about the student."
)


def markdown(evaluation: Mapping[str, Any]) -> str:
    """All tables as Markdown, with what they mean and what happened to rows on the way."""
    lines = ["# Evaluation", "", LEGEND, ""]
    for name, source in evaluation["models"].items():
        lines.append(f"- {name}: {code(source)}")
    for section in sections_of(evaluation):
        lines += ["", f"## {escaped(section.title)}", "", _line(["measure", *section.columns, "better"])]
        lines.append(_line(["---", *("---:" for _ in section.columns), "---"]))
        lines += [_line([escaped(label), *cells, better]) for label, cells, better in section.rows]
    if evaluation["notes"]:
        lines += ["", "## Notes", "", *(f"- {escaped(note)}" for note in evaluation["notes"])]
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


_SECTION = """\
<section aria-labelledby="evaluation">
  <h2 id="evaluation">Evaluation</h2>
  <p class="lead">{{ legend }}</p>
  {% for section in sections %}
  <div class="card scroll" tabindex="0" role="region" aria-label="{{ section.title }}">
  <table class="figures">
    <caption>{{ section.title }}</caption>
    <thead><tr><th scope="col">Measure</th>\
{% for name in section.columns %}<th scope="col">{{ name }}</th>{% endfor %}\
<th scope="col">Better when</th></tr></thead>
    <tbody>
    {% for label, cells, better in section.rows %}
    <tr><th scope="row">{{ label }}</th>{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}<td>{{ better }}</td></tr>
    {% endfor %}
    </tbody>
  </table>
  </div>
  {% endfor %}
  {% for note in notes %}<p class="note">{{ note }}</p>
  {% endfor %}
</section>
"""


def evaluation_section(folder: Path) -> Markup | None:
    """The same tables as a section of the report, from <folder>/evaluation.json; None where there is none."""
    path = folder / f"{NAME}.json"
    if not path.is_file():
        return None
    evaluation, advice = read_json(path), "run eval again, or delete it"
    valid = fitting(_EVALUATION, evaluation, path, advice)
    first, *others = valid.models
    for name, found in valid.sets.items():
        if not {TEACHER, first, *others} <= found.results.keys() or not {*others} <= found.differences.keys():
            raise UserError(f"{path} is damaged (sets.{name} lacks one of its models): {advice}")
    return render(_SECTION, legend=LEGEND, sections=sections_of(evaluation), notes=evaluation["notes"])
