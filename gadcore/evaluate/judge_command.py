"""python -m gadcore.run judge, and compare: an LLM judge on the responses that `eval` wrote."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ConfigDict, Field
from rich.console import Console

from gadcore.config import loading
from gadcore.config.kinds import Location, NonNegative, Positive, Rate, Section
from gadcore.errors import UserError
from gadcore.evaluate.judge import Judge, judge_score, load_prompts
from gadcore.evaluate.judge_rows import JUDGED, find, read_both
from gadcore.evaluate.pairwise import OUTCOMES, compare
from gadcore.evaluate.responses import read_first, write_json
from gadcore.files import file_name
from gadcore.record.reading import read_json
from gadcore.teacher.client import exit_code
from gadcore.teacher.progress import progress
from gadcore.teacher.settings import AskingConfig, SamplingSettings
from gadcore.teacher.store import ReplyStore
from gadcore.text import say


class JudgeSampling(SamplingSettings):
    """Parameters of a request to the judge. temperature none: not sent, for models that allow no other than theirs."""

    temperature: Rate | None = 0.0
    max_tokens: Positive | None = Field(512, description="Of a judgement; a judge that reasons first needs more.")


class JudgingSettings(Section):
    """What is judged."""

    responses: Location = Field("runs/eval", description="Folder that eval wrote: <set>/<model>.jsonl.")
    sets: tuple[str, ...] = Field((), description="Sets by name; empty: all.")
    rows: Positive | None = Field(None, description="Judge only the first rows of a set.")
    prompts: Location | None = Field(None, description="File of judge prompts; default evaluate/judge_prompts.md.")
    store: Location | None = Field(
        None, description="Raw replies; default judgements.jsonl in the folder of responses."
    )
    seed: NonNegative = Field(0, description="Of the bootstrap.")


class ScoreSettings(JudgingSettings):
    """What is judged."""

    models: tuple[str, ...] = Field((), description="Models by name; empty: all.")


class CompareSettings(JudgingSettings):
    """What is compared."""

    a: str = Field("", description="The model whose wins are counted; must be given.")
    b: str = Field("", description="The model that it is compared with; must be given.")


class Asking(AskingConfig):
    """How the judge is asked."""

    sampling: JudgeSampling = JudgeSampling()


class JudgeConfig(Asking):
    """Ratings from 1 to 10 of every model's responses beside the references, by an LLM judge, in both orders."""

    model_config = ConfigDict(title="judge")

    judge: ScoreSettings = ScoreSettings()


class CompareConfig(Asking):
    """Win / Tie / Loss of model a against model b, by an LLM judge, in both orders."""

    model_config = ConfigDict(title="compare")

    compare: CompareSettings = CompareSettings()


class Job(NamedTuple):
    """A result to make: `about` and figures(judge) go into the file at `path`, line(result) to the screen."""

    path: Path
    about: dict[str, Any]
    figures: Callable[[Judge], dict[str, Any]]
    line: Callable[[Mapping[str, Any]], str]


def judge_main(arguments: list[str]) -> int:
    """Writes <responses>/<set>/judge/<judge>/<model>.json for every set and model; exit codes as of _work()."""
    config = loading.load(arguments, JudgeConfig)
    chosen, judge = config.judge, file_name(config.endpoint.model)
    jobs = []
    for set_name, model in find(chosen.responses, chosen.sets, chosen.models):
        folder = Path(chosen.responses) / set_name
        rows = read_first(folder / f"{model}.jsonl")[: chosen.rows]
        figures = partial(judge_score, rows=rows, seed=chosen.seed)
        about = {"set": set_name, "model": model}
        jobs.append(Job(folder / JUDGED / judge / f"{model}.json", about, figures, _score_line))
    return _work(config, chosen, jobs)


def compare_main(arguments: list[str]) -> int:
    """Writes <responses>/<set>/compare/<judge>/<a>/<b>.json for every set; exit codes as of _work()."""
    config = loading.load(arguments, CompareConfig)
    chosen, judge = config.compare, file_name(config.endpoint.model)
    if not chosen.a or not chosen.b:
        raise UserError("two models are needed: --compare.a NAME --compare.b NAME")
    jobs = []
    for set_name in sorted({set_name for set_name, _ in find(chosen.responses, chosen.sets, (chosen.a, chosen.b))}):
        folder = Path(chosen.responses) / set_name
        a, b = (rows[: chosen.rows] for rows in read_both(folder, (chosen.a, chosen.b)))
        figures = partial(compare, a=a, b=b, seed=chosen.seed)
        about = {"set": set_name, "a": chosen.a, "b": chosen.b}
        jobs.append(Job(folder / "compare" / judge / chosen.a / f"{chosen.b}.json", about, figures, _compare_line))
    return _work(config, chosen, jobs)


def _work(config: Asking, chosen: JudgingSettings, jobs: Sequence[Job]) -> int:
    """0: all is judged. 1: some requests have no reply (failed, or the budget is spent), or a result has no prompt
    whose replies could be read. 128 + signal: stopped.
    """
    complete = True
    try:
        with _judge(config, chosen) as judge:
            for job in jobs:
                result = job.about | job.figures(judge)
                complete &= _finish(job.path, result, job.line(result))
                if result["stopped"]:
                    say(f"stopped: {result['stopped']}; the same command goes on")
                    return exit_code(result["stopped"])
    except KeyboardInterrupt:
        say("stopped at once; what was answered is kept, the same command goes on")
        return 128 + signal.SIGINT
    return 0 if complete else 1


@contextmanager
def _judge(config: Asking, chosen: JudgingSettings) -> Iterator[Judge]:
    prompts = load_prompts(Path(chosen.prompts) if chosen.prompts else None)
    path = Path(chosen.store) if chosen.store else Path(chosen.responses) / "judgements.jsonl"
    console = Console(stderr=True, markup=False, emoji=False, highlight=False)
    with ReplyStore(path, config.endpoint.address) as store, progress(console, "judge") as watch:
        for note in store.notes():
            say(f"gadcore: {note}", sys.stderr)
        yield Judge(config.endpoint, config.sampling.parameters(), prompts, store, config.budget, watch)


def _finish(path: Path, result: Mapping[str, Any], line: str) -> bool:
    """Writes a result, prints its line and what is missing; False where requests are unanswered, or none was read."""
    before = read_json(path).get("address") if path.is_file() else None
    write_json(path, result)
    say(line)
    if before not in (None, result["address"]):
        say(f"  {path} held the figures of a judge of the same name at {before}: its replies are still in the store")
    if result["unparsable"]:
        say(
            f"  {result['unparsable']} replies could not be read, their prompts do not count: see {path}; the same "
            "command asks for them anew"
        )
    if result["unanswered"]:
        reasons = sorted({str(request["reason"]) for request in result["unanswered_requests"]})
        say(f"  {result['unanswered']} requests have no reply ({'; '.join(reasons)}): the same command goes on")
    return bool(result["n"]) and not result["unanswered"]


def _score_line(result: Mapping[str, Any]) -> str:
    if result["score"] is None:
        return f"{result['set']} {result['model']}: no score, no prompt could be judged"
    low, high = result["interval"]
    return (
        f"{result['set']} {result['model']}: score {result['score']:.1f} [{low:.1f}, {high:.1f}] on {result['n']} "
        f"prompts (50: as good as the reference); "
        f"position bias {result['position_bias']:+.2f} points, both orders agree in {100 * result['consistency']:.0f} %"
    )


def _compare_line(result: Mapping[str, Any]) -> str:
    title = f"{result['set']} {result['a']} against {result['b']}"
    if not result["n"]:
        return f"{title}: no verdict, no prompt could be judged"
    shares = ", ".join(f"{name} {100 * result[name]:.0f} %" for name in OUTCOMES)
    low, high = result["interval"]
    return (
        f"{title}: {shares}; net {result['net']:+.1f} points [{low:+.1f}, {high:+.1f}] on {result['n']} prompts; "
        f"position bias {result['position_bias']:+.2f}, both orders agree in {100 * result['consistency']:.0f} %"
    )
