"""report.html: what it says, that it is safe to open, and that it stands alone."""

from __future__ import annotations

import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from gadcore.errors import UserError
from gadcore.report import findings
from gadcore.report.charts import Band, Chart, Series, describe, draw, smooth, thin
from gadcore.report.curves import STATES, groups_of
from gadcore.report.page import last_words, write_overlay, write_report
from gadcore.report.svg import nice_ticks
from gadcore.run import main as run_command
from tests.support.report_runs import THREE, answers, folder, lines, metrics

HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)"> \' & {{ 7 * 7 }}'


class Page(HTMLParser):
    """The page as a browser's parser sees it: tags with attributes, and the text outside script and style."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html, self.tags, self.parts, self._raw = html, [], [], False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._raw = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._raw = False

    def handle_data(self, data: str) -> None:
        if not self._raw:
            self.parts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.parts))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def page_of(path: Path) -> Page:
    return Page(write_report(path).read_text(encoding="utf-8"))


def test_a_finished_run(tmp_path: Path) -> None:
    page = page_of(folder(tmp_path / "run", metrics(), THREE))
    for part in (
        "Held-out ROUGE-L rose from 0.200 to 0.300 (+0.100 ± 0.000, 40 of 40 prompts up, 0 down, by warmup).",
        "Stage by stage: warmup +0.100 ± 0.000; GAD left the student as it was.",
        "tells 75 % of the held-out pairs apart",
        "No warnings.",
        "134.5 M parameters",
        "413 training rows, 40 held out",
        "12 prompts were truncated.",
        "Student 39 0.3",
        "everything else",
        'name = "try-out"',
        "Not recorded in this run: Discriminator margin, Fresh discriminator, KL to the reference.",
    ):
        assert part in page.text, part
    assert page.text.count("Question 7 ") == 1


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    rows = metrics(**{f"other/{HOSTILE}": 1.0})
    rows = [row | {"stage": row["stage"] + HOSTILE} for row in rows]
    hostile = [row | {"prompt": HOSTILE, "teacher": HOSTILE, "student": HOSTILE} for row in answers(0.2, 3)]
    run = folder(tmp_path / "run", rows, {f"before {HOSTILE[:1]}": hostile, "after_gad": hostile})
    (run / "samples.jsonl").write_text(
        lines([{"stage": "gad", "step": 5, "prompt": HOSTILE, "teacher": HOSTILE, "student": HOSTILE, "reward": 0.1}])
    )
    (run / "config.toml").write_text('[run]\nname = "<script>alert(3)</script>"\n')
    (run / "summary.json").unlink()
    page = page_of(run)
    assert len(page.all("script")) == 1
    assert page.all("img") == []
    assert not any(key.startswith("on") for _, attrs in page.tags for key in attrs)
    assert page.text.count(re.sub(r"\s+", " ", HOSTILE)) >= 9


def test_the_page_stands_alone(tmp_path: Path) -> None:
    page = page_of(folder(tmp_path / "run", metrics(), THREE))
    assert page.all("link") == []
    assert [attrs.get("src") for attrs in page.all("script")] == [None]
    assert all((attrs["href"] or "").startswith("#") for attrs in page.all("a"))
    assert not re.findall(r"https?://|url\(|@import", page.html)
    ids = [attrs["id"] for _, attrs in page.tags if attrs.get("id")]
    assert len(ids) == len(set(ids))
    assert {(attrs["href"] or "")[1:] for attrs in page.all("a")} <= set(ids)


def test_only_the_script_of_the_page_may_run(tmp_path: Path) -> None:
    import base64
    import hashlib

    page = page_of(folder(tmp_path / "run", metrics(), THREE))
    script = page.html.split("<script>")[-1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert f"script-src 'sha256-{digest}'" in (policy or "")
    assert "default-src 'none'" in (policy or "")


def test_an_unfinished_run(tmp_path: Path) -> None:
    run = folder(tmp_path / "run", metrics()[:7], {"before": answers(0.2), "after_warmup": answers(0.15)}, False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "gad", "st')
    page = page_of(run)
    for part in ("not finished: GAD step 3 of 8", "ROUGE-L fell from", "The last line of metrics.jsonl is torn",
                 "summary.json is not written yet", "0:00:18 in steps so far"):  # fmt: skip
        assert part in page.text, part
    assert "100.0 %" in page.text  # the accuracy, counted from the scores of the rows


def test_the_end_of_a_run_says_what_to_do_next(tmp_path: Path) -> None:
    run = folder(tmp_path / "my run", metrics(), THREE)
    sentences, after = last_words(run)[:-2], last_words(run)[-2:]
    assert len(sentences) == 2 and all(sentence in page_of(run).text for sentence in sentences)
    assert after == [f"report: {run}/report.html", f"next: gadcore chat '{run}', or gadcore serve '{run}'"]
    assert last_words(folder(tmp_path / "other", metrics(), {}))[0] == f"report: {tmp_path}/other/report.html"


def test_an_unfinished_run_says_how_many_samples_a_prompt_has(tmp_path: Path) -> None:
    drawn = [{"text": f"Sample {i}", "finished": True} for i in range(4)]
    runs = {"one": answers(0.2), "four": answers(0.2, samples=drawn)}
    pages = {
        name: page_of(folder(tmp_path / name, metrics()[:2], {"before": rows}, False)) for name, rows in runs.items()
    }
    assert "On 40 held-out prompts, one response each." in pages["one"].text
    assert "On 40 held-out prompts, 4 responses each." in pages["four"].text


def test_a_run_without_any_step(tmp_path: Path) -> None:
    page = page_of(folder(tmp_path / "run", [], {}, False))
    assert "not finished, no step made yet" in page.text
    assert "nothing can be said about whether the student improved" in page.text
    assert page.all("figure") == []


def test_a_seqkd_run(tmp_path: Path) -> None:
    rows = [{"stage": "seqkd", "step": i, "stage_step": i, "stage_steps": 3, "student/ce": 2.0 / i} for i in (1, 2, 3)]
    bare = [{k: v for k, v in row.items() if not k.endswith("score")} for row in answers(0.2)]
    run = folder(tmp_path / "run", rows, {"before": bare, "after_seqkd": bare})
    page = page_of(run)
    assert "did not change measurably" in page.text
    assert "before → after SeqKD" in page.text
    assert "Student cross-entropy" in page.text
    assert "score" not in page.text.split("Responses to held-out prompts")[1].split("Prompt 1")[1]


def test_evaluations_of_different_prompts_are_refused(tmp_path: Path) -> None:
    other = answers(0.3)
    other[4]["prompt"] = "another"
    run = folder(tmp_path / "run", metrics(), {"before": answers(0.2), "after_gad": other})
    with pytest.raises(UserError, match=r"after_gad\.jsonl, line 5 has another prompt"):
        write_report(run)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.toml", "[run", "config.toml is not valid TOML"),
        ("summary.json", "{", "summary.json cannot be read as JSON"),
        ("metrics.jsonl", '{"stage": "gad"}\n', "metrics.jsonl, line 1 is damaged (step: missing)"),
        ("metrics.jsonl", "{}\nx\n{}\n", "metrics.jsonl, line 2 is not a JSON object"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    run = folder(tmp_path / "run", metrics(), THREE)
    (run / name).write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        write_report(run)


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("more", "title"),
    [
        ({"discriminator/accuracy": 1.0}, "The discriminator is never fooled"),
        ({"discriminator/accuracy": 0.51}, "The discriminator only guesses"),
        ({"reward/length_corr": -0.7}, "Reward goes with length"),
        ({"reward/std": 1e-5}, "Rewards do not differ within a group"),
        ({"length/cut_share": 0.4}, "Many responses are cut"),
        ({"sampler/logprob_diff_mean": 0.02}, "Sampler and trainer disagree"),
        ({"student/loss": math.nan}, "Numbers that are not finite"),
        ({}, None),
    ],
)
def test_warnings(more: dict[str, float], title: str | None) -> None:
    assert [w.title for w in findings.warnings(metrics(**more))] == ([title] if title else [])


def test_a_rising_cut_share_is_told_with_its_ends() -> None:
    rows = metrics(0, 10)
    for i, row in enumerate(rows):
        row["length/cut_share"] = 0.02 * i
    (warning,) = findings.warnings(rows)
    assert "rose from 1.0 % to 17 %" in warning.text


def test_the_difference_is_paired() -> None:
    before, after = ([{"prompt": i, "rouge_l": v} for i, v in enumerate(values)] for values in ([0.1, 0.5], [0.2, 0.8]))
    found = findings.difference(findings.ROUGE_L, before, after)
    assert found is not None and found.mean == pytest.approx(0.2)
    # The changes are 0.1 and 0.3: standard error 0.1, and t at one degree of freedom. Two prompts show nothing.
    assert found.margin == pytest.approx(1.27062)
    assert (found.up, found.down, found.clear, found.change) == (2, 0, False, "noise")


def noisy(mean: float, spread: float, count: int = 40, **more: Any) -> list[dict[str, Any]]:
    """Answers whose values scatter around a mean, independently of those of another call with another mean."""
    rng = random.Random(f"{mean} {spread}")
    rows = answers(0.3, count, **more)
    for row in rows:
        row["rouge_l"] = min(1.0, max(0.0, rng.gauss(mean, spread)))
        row["length_ratio"] = 1 + rng.gauss(mean, spread)
        row["cut_share"] = float(rng.random() >= mean)
    return rows


@pytest.mark.parametrize(("after", "mark"), [(0.5, "better"), (0.302, "noise")])
def test_every_figure_is_tested_against_the_noise(after: float, mark: str, tmp_path: Path) -> None:
    run = folder(tmp_path / "run", metrics(), {"before": noisy(0.305, 0.1), "after_gad": noisy(after, 0.1)})
    (table,) = [table_of_page(run)]
    assert table["ROUGE-L"][0] == mark
    # Further from 1 is worse, more unfinished ones are, whatever the summary's figures round to.
    assert table["length ratio"][0] == {"better": "worse"}.get(mark, mark)
    assert table["D tells apart"][0] == ""
    assert " ± " in table["ROUGE-L"][1]


def table_of_page(run: Path) -> dict[str, tuple[str, str]]:
    """{measure: (class, text) of its first change}."""
    html = write_report(run).read_text()
    rows = re.findall(r'<tr><th scope="row">([^<]*)</th><td class="([^"]*)"[^>]*>([^<]*)', html)
    return {label: (kind, text) for label, kind, text in rows}


def test_what_cannot_be_tested_has_no_arrow(tmp_path: Path) -> None:
    run = folder(tmp_path / "run", metrics(), {"before": noisy(0.1, 0.0), "after_gad": noisy(0.9, 0.0)})
    summary = json.loads((run / "summary.json").read_text())
    summary["evaluations"]["after_gad"]["cut_share"] = 0.9
    (run / "summary.json").write_text(json.dumps(summary))
    assert table_of_page(run)["responses cut"][0] == "better"
    for name in ("before", "after_gad"):
        path = run / "evaluations" / f"{name}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text(lines([{k: v for k, v in row.items() if k != "cut_share"} for row in rows]))
    assert table_of_page(run)["responses cut"][0] == "untested"
    (run / "evaluations/before.jsonl").unlink()
    assert {kind for kind, _ in table_of_page(run).values()} <= {"untested", ""}


def test_change_is_called_by_chance_as_often_as_the_interval_says() -> None:
    called = {4: 0, 40: 0}
    for count in called:
        for trial in range(400):
            rng = random.Random(trial)
            before, after = ([{"prompt": i, "rouge_l": rng.gauss(0, 1)} for i in range(count)] for _ in range(2))
            called[count] += findings.difference(findings.ROUGE_L, before, after).change != "noise"
    assert all(0.02 <= n / 400 <= 0.08 for n in called.values()), called


def test_responses_come_before_the_curves_and_the_machine_is_folded(tmp_path: Path) -> None:
    page = page_of(folder(tmp_path / "run", metrics(**{"machine/cpu_load": 1.0}), THREE))
    order = [
        page.html.index(f'id="{key}"') for key in ("before-and-after", "samples", "learning", "machinery", "hardware")
    ]
    assert order == sorted(order)
    folded = [attrs.get("id") for attrs in page.all("details") if "open" not in attrs]
    assert {"machinery", "hardware"} <= set(folded)


@pytest.mark.parametrize(
    ("low", "high", "options", "labels"),
    [
        (0.0, 40_000.0, {}, ["0", "10,000", "20,000", "30,000", "40,000"]),
        (0.0, 2e6, {}, ["0", "0.5 M", "1.0 M", "1.5 M", "2.0 M"]),
        (1e-4, 1.0, {"log": True}, ["0.0001", "0.001", "0.01", "0.1", "1"]),
        (1.0, 1000.0, {"log": True, "unit": "s"}, ["1", "10", "100", "1,000 s"]),
        (0.0, 2.0, {"unit": "GiB"}, ["0.0", "0.5", "1.0", "1.5", "2.0 GiB"]),
        (0.0, 1.0, {"unit": "%"}, ["0 %", "50 %", "100 %"]),
        (-0.0002, 0.0002, {}, ["−0.0002", "−0.0001", "0.0000", "0.0001", "0.0002"]),
    ],
)
def test_axes_are_labelled_as_people_write_numbers(low, high, options, labels) -> None:
    html = draw(Chart("c", "T", "", [Series("x", [(1, low), (2, high)])], **options), [Band("gad", 1, 2)])
    assert re.findall(r'<text class="tick" x="-8"[^>]*>([^<]*)', html) == labels


def two_runs(tmp_path: Path) -> list[Path]:
    first = folder(tmp_path / "a", metrics(), {"before": noisy(0.2, 0.1), "after_gad": noisy(0.3, 0.1)})
    second = folder(tmp_path / "b", metrics(2, 6), {"after_gad": noisy(0.6, 0.1)})
    return [first, second]


def test_two_runs_share_their_charts_and_are_compared_prompt_by_prompt(tmp_path: Path, capsys) -> None:
    first, second = two_runs(tmp_path)
    assert run_command(["report", str(first), str(second)]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == second / "report-beside-a.html" and not (second / "report.html").exists()
    page = Page(path.read_text())
    assert "a beside b" in page.text and "beyond the noise between prompts" in page.text
    charts = [attrs for attrs in page.all("div") if attrs.get("class") == "plot"]
    accuracy = next(c for c in charts if c["aria-label"] == "Discriminator accuracy")
    assert re.search(r"a 6\d\.0 % · b", accuracy["data-chart"] or "")
    assert (accuracy["data-first"], accuracy["data-last"]) == ("0.5", "12.5")
    assert page.text.count("Question 7 ") == 1
    # Stacked parts of two runs would lie upon each other: their sums are drawn.
    seconds = next(c for c in charts if c["aria-label"] == "Seconds per step")
    assert "a: in all 2.000 s · b: in all 2.000 s" in (seconds["data-chart"] or "")


def test_two_runs_on_other_prompts(tmp_path: Path) -> None:
    first, second = two_runs(tmp_path)
    rows = [row | {"prompt": row["prompt"] + "!"} for row in noisy(0.6, 0.1)]
    (second / "evaluations/after_gad.jsonl").write_text(lines(rows))
    text = Page(write_overlay(first, second).read_text()).text
    assert "whether by chance cannot be told" in text and "no change is tested, no responses are shown" in text


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [(["a", "a"], "are the same run"), (["a", "b", "a"], "report takes one run folder, or two"),
     (["--folder", "a"], "report takes one run folder"), (["a", "none"], "none is no run folder")],
)  # fmt: skip
def test_two_runs_that_cannot_be_laid_side_by_side(arguments, problem, tmp_path: Path, capsys, monkeypatch) -> None:
    two_runs(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert run_command(["report", *arguments]) == 2
    assert problem in capsys.readouterr().err


def test_help_says_what_report_takes(capsys) -> None:
    assert run_command(["report", "--help"]) == 0
    assert "report [RUN_FOLDER] [OTHER_RUN_FOLDER]" in capsys.readouterr().out


def test_every_number_of_the_metrics_has_a_curve() -> None:
    rows = metrics(**{"memory/new_gib": 3.0, "student/loss": 0.1, "new/figure": 1})
    names = {s.name for group in groups_of(rows) for chart in group.charts for s in chart.series}
    assert {"memory/new_gib", "new/figure", "training batches", "loss"} <= names


def test_the_figures_of_steps_and_machine_have_charts_that_say_how_to_read_them() -> None:
    keys = ["convergence/accuracy", "heldout/accuracy", "heldout/train_accuracy", "heldout/ce",
            "reward/finished_corr", "reward/finished_gap", "samples/repetition",
            "machine/cpu_load", "machine/rss_gib", "machine/major_faults", "machine/minor_faults", "machine/energy_j",
            "machine/gpu_util", "machine/gpu_memory_used_gib", "machine/gpu_power_w", "machine/gpu_sm_clock_mhz",
            "machine/gpu_throttled_share", "machine/gpu_energy_j", "energy/j_per_sampled_token", "memory/moving_s",
            *(f"memory/{state}_{kind}" for state in STATES for kind in ("held", "peak"))]  # fmt: skip
    groups = groups_of(metrics(**dict.fromkeys(keys, 1.0)))
    assert "other" not in {group.key for group in groups}
    (hardware,) = [group for group in groups if group.key == "hardware"]
    assert hardware.absent == []


def test_bytes_are_drawn_as_gib() -> None:
    rows = metrics(**{"memory/rollout_held": 3 * 2**30})
    (chart,) = [chart for group in groups_of(rows) for chart in group.charts if chart.title == "Memory held"]
    assert [(s.name, {v for _, v in s.points}) for s in chart.series] == [("rollout", {3.0})]
    assert "rollout: 3.000 GiB at step 1" in describe(chart)


def test_the_tables_of_an_evaluation_stand_on_the_page(tmp_path: Path) -> None:
    run = folder(tmp_path / "run", metrics(), THREE)
    assert "#evaluation" not in {attrs["href"] for attrs in page_of(run).all("a")}
    figure = {"rouge_l": {"mean": 0.25, "interval": [0.2, 0.3]}}
    found = {"domain": "in", "prompts": 8, "source": f"test.jsonl {HOSTILE}", "differences": {},
             "results": {"teacher": {}, "gad": figure}}  # fmt: skip
    (run / "eval").mkdir()
    (run / "eval/evaluation.json").write_text(
        json.dumps({"models": {"gad": "runs/gad"}, "sets": {"test": found}, "notes": ["2 responses were cut."]})
    )
    page = page_of(run)
    assert "#evaluation" in {attrs["href"] for attrs in page.all("a")}
    assert "0.250 [0.200, 0.300]" in page.text and "2 responses were cut." in page.text
    headings = [attrs.get("id") for attrs in page.all("h2")]
    assert headings[:5] == ["verdict", "before-and-after", "evaluation", "samples", "learning"]
    assert page.all("img") == []


BANDS = [Band("warmup", 1, 2), Band("GAD", 3, 5)]


def test_a_chart_is_drawn_to_scale() -> None:
    chart = Chart("c", "Title", "", [Series("loss", [(1, 0.0), (3, 1.0), (5, 2.0)])])
    html = draw(chart, BANDS)
    # Steps 0.5 .. 5.5 and values 0 .. 2 fill a square of 1000 units, with y downwards.
    assert 'd="M100 1000l.01 0L500 500L900 0"' in html
    assert 'x="40.00%" width="60.00%"' in html
    assert "loss: 0 at step 1, 2.000 at step 5; lowest 0 at step 1, highest 2.000 at step 5." in html


def test_a_gap_where_a_value_is_not_finite() -> None:
    chart = Chart("c", "Title", "", [Series("loss", [(1, 0.0), (2, math.nan), (3, 1.0), (4, math.inf), (5, 0.5)])])
    (path,) = re.findall(r'<path d="([^"]*)"', draw(chart, BANDS))
    assert path.count("M") == 3
    assert "nan" not in path
    assert "step 2 (warmup 2) · loss nan" in json.loads(Page(draw(chart, BANDS)).all("div")[0]["data-chart"] or "")[1]


@pytest.mark.parametrize("value", [0.0, -3.0, 1e-9, 1e9, math.nan])
@pytest.mark.parametrize("options", [{}, {"zero": True}, {"log": True}, {"unit": "%"}, {"stacked": True}])
def test_a_single_value_can_be_drawn(value: float, options: dict[str, Any]) -> None:
    html = draw(Chart("c", "Title", "", [Series("x", [(1, value)])], **options), [Band("gad", 1, 1)])
    coordinates = re.findall(r'[xy][12]?="(-?[\d.]+|nan|inf)%"', html)
    assert coordinates
    assert all(-0.01 <= float(c) <= 100.01 for c in coordinates)


def test_stacked_parts_lie_on_each_other() -> None:
    parts = [Series("a", [(1, 1.0), (2, 1.0)]), Series("b", [(2, 3.0)])]
    first, second = re.findall(r' d="([^"]*)"', draw(Chart("c", "T", "", parts, stacked=True), [Band("gad", 1, 2)]))
    assert first == "M0 1000V750H500V1000ZM500 1000V750H1000V1000Z"
    assert second == "M500 750V0H1000V750Z"


def test_thin_keeps_peaks_and_order() -> None:
    points = [(float(i), 0.0) for i in range(5000)]
    points[1234], points[4321] = (1234.0, 9.0), (4321.0, -9.0)
    kept = thin(points, 100)
    assert len(kept) <= 100
    assert {(1234.0, 9.0), (4321.0, -9.0)} <= set(kept)
    assert kept == sorted(kept)
    assert smooth([(float(i), float(i)) for i in range(400)])[200] == (200.0, 200.0)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.0, 1.0, [0, 0.5, 1.0]), (0.0, 2.0, [0, 0.5, 1, 1.5, 2]), (-0.3, 0.6, [-0.5, 0, 0.5, 1.0]), (7e-5, 9e-5, None)],
)
def test_ticks_are_round_and_enclose(low: float, high: float, expected: list[float] | None) -> None:
    ticks = nice_ticks(low, high, 4)
    assert ticks[0] <= low + 1e-12 and ticks[-1] >= high - 1e-12
    assert 3 <= len(ticks) <= 7
    if expected is not None:
        assert ticks == pytest.approx(expected)


def test_a_chart_in_words_leaves_out_what_is_not_finite() -> None:
    assert describe(Chart("c", "T", "", [Series("x", [(1, math.nan)])])) == ""


def test_a_long_run_makes_a_small_page(tmp_path: Path) -> None:
    run = folder(tmp_path / "run", metrics(1000, 3000), {}, False)
    assert write_report(run).stat().st_size < 2_500_000


def measured(rouge_l: float, repeated: float, seed: int) -> list[dict[str, Any]]:
    """Answers of 40 prompts with a small scatter."""
    rng = random.Random(seed)
    rows = answers(rouge_l, 40)
    for row in rows:
        row["rouge_l"] = rouge_l + rng.uniform(-0.01, 0.01)
        row["repeated"] = repeated + rng.uniform(-0.01, 0.01)
    return rows


def sentences(**evaluations: list[dict[str, Any]]) -> list[str]:
    figures = {name: {"rouge_l": fmean(row["rouge_l"] for row in rows)} for name, rows in evaluations.items()}
    return findings.verdict(figures, evaluations)


def test_the_first_sentences_say_what_changed_and_by_which_stage() -> None:
    gad, said, *_ = sentences(
        before=measured(0.15, 0.08, 1), after_sft=measured(0.22, 0.08, 2), after_gad=measured(0.22, 0.02, 3)
    )
    assert gad.startswith("GAD made the student better: on 40 held-out prompts the share of responses that say a 3-")
    assert re.match(r"Held-out ROUGE-L rose from 0.15\d to 0.22\d \(\+0.0\d+ ± .*, by SFT\); ", said)
    assert re.search(r"; the share of responses that say a 3-gram twice fell from 8.\d % to 2.\d % \(−", said)
    assert said.endswith(", by GAD).")


def test_the_first_sentence_without_a_change_of_rouge_l() -> None:
    quiet, same = measured(0.2, 0.08, 1), measured(0.2, 0.08, 2)
    assert sentences(before=quiet, after_gad=same)[0].startswith("Held-out ROUGE-L did not change measurably")
    said = sentences(before=quiet, after_gad=measured(0.2, 0.02, 3))[0]
    assert said.startswith("Held-out the share of responses that say a 3-gram twice fell from 8")
    assert "; ROUGE-L did not change measurably" in said
