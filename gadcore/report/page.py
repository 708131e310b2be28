"""report.html: one run on one page that stands alone, made only from the files of the run folder.

It can be written at any time: for a run that has not finished, or has made no step yet, it shows what there is.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from gadcore.files import file_name, write_whole
from gadcore.record.html import standalone
from gadcore.report.files import RunFiles, load
from gadcore.report.findings import verdict
from gadcore.report.overlay import overlay_of
from gadcore.report.parts import figures_of, parts_of


def write_report(run_dir: Path) -> Path:
    """Writes <run_dir>/report.html and returns its path; an older report is replaced in one move.

    Raises UserError where run_dir is no run folder, a file in it is damaged, or its evaluations do not match.
    """
    run = load(run_dir)
    target = Path(run_dir) / "report.html"
    write_whole(target, render(run), errors="replace")
    return target


def last_words(run_dir: Path) -> list[str]:
    """Lines for the end of a run: the first two sentences of the report, of a run without evaluations none, and what to
    do next; raises as above."""
    run, folder = load(run_dir), shlex.quote(str(run_dir))
    sentences = verdict(figures_of(run), run.evaluations)[:2] if run.evaluations else []
    report = f"report: {run_dir / 'report.html'}"
    return [*sentences, report, f"next: gadcore chat {folder}, or gadcore serve {folder}"]


def write_overlay(one: Path, two: Path) -> Path:
    """Writes <two>/report-beside-<name of one>.html, both runs on one page, and returns its path; raises as above."""
    first, second = load(one), load(two)
    target = Path(two) / f"report-beside-{file_name(first.folder.resolve().name)}.html"
    variables = overlay_of(first, second)
    write_whole(
        target,
        standalone("gadcore.report", "report", f"{variables['run']}: gadcore report", **variables),
        errors="replace",
    )
    return target


def render(run: RunFiles) -> str:
    """The page as HTML. All text from the run folder goes through the template's escaping."""
    parts = parts_of(run)
    return standalone("gadcore.report", "report", f"{parts['run']}: gadcore report", **parts)
