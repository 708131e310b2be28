"""The two views of a running run."""

from __future__ import annotations

import io
import logging
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gadcore.errors import UserError
from gadcore.record.live import LiveView, sparkline
from gadcore.record.plain import PlainView
from gadcore.record.text import RunPlan, clean, summary_table
from gadcore.record.view import make_view

PLAN = RunPlan("try-out", Path("runs/try-out"), "org/student", "org/judge", "cpu", (("warmup", 4), ("gad", 8)))
RESULT = {
    "rows": 60, "rouge_l": 0.25, "ngram_f1": {"1": 0.3, "2": 0.2, "3": 0.1, "4": 0.05}, "length_ratio": 1.2,
    "cut_share": 0.1, "margin": 0.8, "accuracy": 0.75,
}  # fmt: skip


def row(stage_step: int = 3, **more: Any) -> dict[str, Any]:
    return {
        "stage": "gad", "step": 4 + stage_step, "stage_step": stage_step, "stage_steps": 8, "reward/mean": -0.4567,
        "reward/std": 0.31, "discriminator/accuracy": 0.712, "discriminator/margin": 0.83, "student/kl": 0.0012,
        "length/student": 212.0, "length/teacher": 180.0, "length/cut_share": 0.031, "reward/length_corr": 0.12,
        "sampler/logprob_diff_mean": 2.1e-4, "sampler/logprob_diff_max": 3e-3, "time/total": 21.0,
        "perf/rollout_tokens_per_s": 1234.0, **more,
    }  # fmt: skip


def triplet(student: str = "short answer") -> dict[str, Any]:
    return {"stage": "gad", "step": 7, "prompt": "Why is the sky blue?", "teacher": "Because of [bold]scattering[/].",
            "student": student, "reward": -0.3, "teacher_score": 0.8}  # fmt: skip


def terminal(width: int = 80, height: int = 24) -> Console:
    return Console(
        file=io.StringIO(), force_terminal=True, width=width, height=height, color_system=None, markup=False,
        emoji=False, highlight=False, _environ={"TERM": "xterm"},
    )  # fmt: skip


def panel(view: LiveView, width: int = 80, height: int = 24) -> list[str]:
    console = terminal(width, height)
    with console.capture() as capture:
        console.print(view)
    return capture.get().splitlines()


def live(width: int = 80, height: int = 24) -> LiveView:
    view = LiveView(terminal(width, height))
    view._plan = PLAN
    view.stage("gad", 8)
    return view


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40), (200, 60)])
def test_the_panel_fits_the_terminal(width: int, height: int) -> None:
    view = live(width, height)
    for step in range(1, 9):
        view.step(row(step))
    view.sample(triplet("many words " * 500))
    view.status("sampling 32 responses")
    lines = panel(view, width, height)
    assert len(lines) <= height - 3
    assert {len(line) for line in lines} == {width}


def test_the_panel_tells_what_matters() -> None:
    view = live()
    view.step(row(3))
    view.status("sampling 32 responses")
    view.sample(triplet())
    text = "\n".join(panel(view))
    for part in ("gad (2 of 2)", "step 3/8", "sampling 32 responses", "-0.457 ± 0.310", "71.2 %", "212 / 180 teacher",
                 "3.1 %", "2.1e-04, max 3.0e-03", "sampling 1,234", "Why is the sky blue?", "short answer",
                 "[bold]scattering[/]", "stage 0:01:45, run 0:01:45"):  # fmt: skip
        assert part in text


def now_of(view: LiveView) -> str:
    return next(line.strip("│ ") for line in panel(view) if line.startswith("│ now ")).removeprefix("now  ")


def test_what_is_going_on_ends_with_what_comes_next() -> None:
    view = live()
    status = "evaluating on 16 held-out prompts"

    def held() -> str:
        view.status(status)
        view.phase("evaluation")
        assert now_of(view) == status
        return status

    for ends in (
        lambda: view.step(row(3)),
        lambda: view.evaluation("before", RESULT),
        lambda: view.stage("sft", 10),
        lambda: view.phase("student"),
        lambda: view.phase("discriminator"),
    ):
        held()
        ends()
        assert status not in now_of(view)
    # A phase that the status speaks of does not end it; the same one later in a step has no status.
    view.status("sampling 32 responses")
    for phase, now in (
        ("synchronise", "sampling 32 responses"),
        ("rollout", "sampling 32 responses"),
        ("discriminator", "the discriminator computes"),
        ("rollout", "waiting for samples"),
        ("student_update", "the student is updated"),
    ):
        view.phase(phase)
        assert now_of(view) == now


def step_of(view: LiveView, stage: str, stage_step: int, seconds: float) -> None:
    more = {"stage": stage, "stage_steps": dict(view._plan.stages)[stage], "time/total": seconds}
    view.step(row(stage_step) | more)


def test_a_stage_to_come_takes_what_the_planner_makes_of_the_one_that_was_timed() -> None:
    view = live()
    stages = (("sft", 10), ("warmup", 4), ("gad", 8))
    view._plan = replace(PLAN, stages=stages, step_seconds={"sft": 2.0, "warmup": 10.0, "gad": 20.0})
    view.stage("sft", 10)
    step_of(view, "sft", 9, 3.0)
    # 1 step of 3 s, 4 of 3 * 5, 8 of 3 * 10.
    assert "stage 0:00:03, run about 0:05:03" in "\n".join(panel(view))
    view.stage("warmup", 4)
    assert "stage 0:01:00, run about 0:05:00" in "\n".join(panel(view))
    step_of(view, "warmup", 1, 30.0)
    # What this stage took counts now: 3 of 30, 8 of 30 * 2.
    assert "stage 0:01:30, run about 0:09:30" in "\n".join(panel(view))
    view.stage("gad", 8)
    step_of(view, "gad", 6, 11.0)
    assert "stage 0:00:22, run 0:00:22" in "\n".join(panel(view))


def test_without_a_prediction_the_run_takes_at_least_so_long() -> None:
    view = live()
    view.stage("warmup", 4)
    step_of(view, "warmup", 1, 10.0)
    assert "stage 0:00:30, run at least 0:01:50" in "\n".join(panel(view))


def test_the_run_counts_the_evaluations_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    view = live()
    view._plan = replace(PLAN, step_seconds={"warmup": 1.0, "gad": 1.0})
    view.status("evaluating on 16 held-out prompts")
    now[0] += 60.0
    view.evaluation("before", RESULT)
    view.stage("warmup", 4)
    step_of(view, "warmup", 1, 10.0)
    # One after either stage.
    assert "stage 0:00:30, run about 0:03:50" in "\n".join(panel(view))
    view.stage("gad", 8)
    step_of(view, "gad", 8, 10.0)
    assert "stage 0:00:00, run about 0:01:00" in "\n".join(panel(view))
    view.evaluation("after_gad", RESULT)
    assert "stage 0:00:00, run 0:00:00" in "\n".join(panel(view))


def test_the_panel_before_the_first_step_has_no_figures() -> None:
    text = "\n".join(panel(live()))
    assert "step 0/8" in text
    assert "time left is known after the first step" in text
    assert "nan" not in text


def test_other_libraries_do_not_tear_the_live_view(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.StringIO()
    monkeypatch.setattr(sys, "stdout", raw)
    monkeypatch.setattr(sys, "stderr", raw)
    console = terminal()
    early = logging.getLogger("test_terminal.early")
    handler = logging.StreamHandler(sys.stderr)
    early.addHandler(handler)
    view = LiveView(console)
    view.start(PLAN)
    try:
        early.warning("third party [/oops] says")
        print("printed [/too]", flush=True)
        sys.stderr.write("half a line [/x]")
        sys.stderr.flush()
        view.message("kept [/as] it is \x1b[31m")
    finally:
        view.close()
        view.close()
        early.removeHandler(handler)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert raw.getvalue() == ""
    for part in ("third party [/oops] says", "printed [/too]", "half a line [/x]", "kept [/as] it is ·[31m"):
        assert part in shown
    assert handler.stream is raw
    assert sys.stderr is raw


def test_the_summary_comes_after_the_panel() -> None:
    console = terminal()
    view = LiveView(console)
    view.start(PLAN)
    view.summary({"evaluations": {"before": RESULT}})
    view.close()
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.rindex("Held-out prompts (60 rows)") > shown.rindex("gadcore · try-out")


def plain() -> tuple[PlainView, io.StringIO]:
    file = io.StringIO()
    view = make_view("auto", Console(file=file))
    assert isinstance(view, PlainView)
    return view, file


def test_plain_is_one_line_a_step() -> None:
    view, file = plain()
    view.start(PLAN)
    view.stage("gad", 8)
    view.status("sampling 32 responses")
    for step in (1, 2):
        view.step(row(step))
        view.status("sampling 32 responses")
    view.sample(triplet('two\nlines and a "quote" \x1b[2J' + "x" * 500))
    view.evaluation("after_gad", RESULT)
    view.message("saved")
    lines = file.getvalue().splitlines()
    assert " ".join(line.split()[0] for line in lines) == "run stage status step step sample evaluation note"
    assert lines[3].startswith("step 5 gad 1/8 reward/mean=-0.457 reward/std=0.310 discriminator/margin=0.830")
    assert "\x1b" not in file.getvalue()
    assert 'student="two lines and a \\"quote\\" ·[2Jxxx' in lines[5]
    assert "60 rows · ROUGE-L 0.250 · length ratio 1.200 · responses cut 10.0 %" in lines[6]


def test_plain_survives_a_pipe_that_speaks_ascii() -> None:
    raw = io.BytesIO()
    view = PlainView(Console(file=io.TextIOWrapper(raw, encoding="ascii")))
    view.message("naïve – 日")
    view.summary({"evaluations": {"before": RESULT}})
    assert raw.getvalue().startswith(b"note na\\xefve \\u2013 \\u65e5\n")


def test_which_view_is_made() -> None:
    assert isinstance(make_view("auto", terminal()), LiveView)
    assert isinstance(make_view("plain", terminal()), PlainView)
    with pytest.raises(UserError, match="needs a terminal"):
        make_view("live", Console(file=io.StringIO()))
    with pytest.raises(UserError, match="unknown"):
        make_view("fancy", terminal())


def test_summary_table_has_the_change_and_its_direction() -> None:
    after = RESULT | {"rouge_l": 0.2, "length_ratio": 1.1, "cut_share": 0.05, "accuracy": None}
    console = terminal()
    with console.capture() as capture:
        console.print(summary_table({"evaluations": {"before": RESULT, "after_gad": after}}))
    lines = {line.split("  ")[1].strip(): line for line in capture.get().splitlines() if line.count("  ") > 1}
    assert "-0.050" in lines["ROUGE-L"]
    assert "nearer 1" in lines["length ratio"]
    assert "-5.0 pp" in lines["responses cut"]
    assert "–" in lines["D tells apart"]
    assert all(len(line) <= 80 for line in capture.get().splitlines())


def test_summary_table_without_evaluations() -> None:
    assert str(summary_table({})).startswith("No prompts were held out (data.eval)")


@pytest.mark.parametrize(
    ("values", "width", "expected"),
    [
        ([], 8, ""),
        ([1.0, 1.0], 8, "▄▄"),
        ([0.0, 7.0], 8, "▁█"),
        ([0.0, math.nan, 1.0], 8, "▁×█"),
        ([0.0, 0.0, 1.0, 1.0], 2, "▁█"),
    ],
)
def test_sparkline(values: list[float], width: int, expected: str) -> None:
    assert sparkline(values, width) == expected


def test_clean_disarms_a_text() -> None:
    assert clean("a\n\tb\x1b[2J \u202eevil\x07 👩\u200d🔬") == "a b·[2J ·evil· 👩\u200d🔬"
