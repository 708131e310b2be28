"""report.html: one run on one page that stands alone, made only from the files of the run folder.

It can be written at any time: for a run that has not finished, or has made no step yet, it shows what there is.
"""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from gadcore.files import write_whole
from gadcore.report.files import RunFiles, load
from gadcore.report.parts import parts_of


def write_report(run_dir: Path) -> Path:
    """Writes <run_dir>/report.html and returns its path; an older report is replaced in one move.

    Raises UserError where run_dir is no run folder, a file in it is damaged, or its evaluations do not match.
    """
    run = load(run_dir)
    target = Path(run_dir) / "report.html"
    write_whole(target, render(run), errors="replace")
    return target


def render(run: RunFiles) -> str:
    """The page as HTML. All text from the run folder goes through the template's escaping."""
    js = _asset("report.js")
    digest = base64.b64encode(hashlib.sha256(js.encode()).digest()).decode()
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_asset("report.html")).render(
        script_hash=f"sha256-{digest}", css=Markup(_asset("report.css")), js=Markup(js), **parts_of(run)
    )


def _asset(name: str) -> str:
    return (files("gadcore.report") / name).read_text(encoding="utf-8")
