"""The command line: gadcore [COMMAND] [settings], or python -m gadcore.run."""

from __future__ import annotations

import importlib
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console

from gadcore import __version__
from gadcore.config import loading
from gadcore.config.command_line import HELP, setting_kinds, split
from gadcore.config.default_job import GPU_PRESET, default_preset
from gadcore.config.functions import check_named
from gadcore.config.process import (
    SIGNALS,
    StopSignals,
    keep_writing,
    leave,
    restarts,
    set_environment,
    several_processes,
)
from gadcore.config.settings import Config
from gadcore.errors import Interrupted, UserError, is_users
from gadcore.files import clear_temporaries
from gadcore.record.run_folder import LATEST, RUNS, RunFolder
from gadcore.record.tracking import check_tracker
from gadcore.text import say
from gadcore.train.early import check_files

if TYPE_CHECKING:
    from gadcore.train.job import Job


class Command(NamedTuple):
    """usage: what may follow the name. function: "module:name", imported when it is asked for; it takes the arguments
    and, where `prepared`, prepare(settings), to be called before torch is loaded. "": a training run. own_help: it
    knows --help itself, and lists settings or options. details: what --help adds for one that does not."""

    usage: str
    summary: str
    function: str = ""
    prepared: bool = False
    own_help: bool = True
    details: str = ""


DOCTOR_D = """\
  RUN_FOLDER       of a run with held-out rows (data.eval) and a discriminator; it need not have finished
  --noise          trains two more discriminators of other seeds on the held-out pairs and compares their rewards;
                   takes as long as two measurements of the convergence rule (convergence.steps)

It reads the samples and scores of the last held-out evaluation and the metrics, and asks the discriminator that the run
left, or that of its newest checkpoint: does one text get one score whoever wrote it, does the end marker decide, are
rows that it was trained on known by heart, is it length that it scores. A line a check says what was found, and which
setting mends it. The figures go into doctor-d.json and into the run's report. Exit code 1: something is wrong."""

COMMANDS = {
    "train": Command("[settings]", "train a student; without a command this one is meant"),
    "seqkd": Command("[settings]", "the baseline: cross-entropy on the teacher's responses only"),
    "soda": Command(
        "[settings]", "the baseline: DPO of the teacher's responses against one snapshot of the student's own"
    ),
    "data": Command(
        "FILE [settings]",
        "what a run would read of a file: rows, lengths, what is cut, examples",
        "gadcore.train.data_command:main",
        prepared=True,
    ),
    "plan": Command(
        "[settings]", "what a run will need: memory, time, does it fit", "gadcore.plan.command:main", prepared=True
    ),
    "collect": Command("[settings]", "ask a teacher for responses, over an API", "gadcore.teacher.command:main"),
    "eval": Command(
        "[settings]",
        "sample from models and compare them with the teacher",
        "gadcore.evaluate.command:main",
        prepared=True,
    ),
    "judge": Command(
        "[settings]", "ratings by an LLM judge of what eval sampled", "gadcore.evaluate.judge_command:judge_main"
    ),
    "compare": Command(
        "[settings]",
        "wins of one model over another by an LLM judge",
        "gadcore.evaluate.judge_command:compare_main",
    ),
    "sheet": Command(
        "[settings]", "a blind sheet for people to judge two models", "gadcore.evaluate.human_command:sheet_main"
    ),
    "tally": Command(
        "KEY.json ANSWERS.json [ANSWERS.json ..]",
        "the table of the sheets that came back",
        "gadcore.evaluate.human_command:tally_main",
        own_help=False,
        details="""\
  KEY.json         which model stands on which side: sheet wrote it beside the page
  ANSWERS.json     what a rater's page has saved; give all of them""",
    ),
    "report": Command(
        "[RUN_FOLDER] [OTHER_RUN_FOLDER]",
        f"write report.html of a run again (default {LATEST}), or two runs on one page",
        "gadcore.run:report_main",
        own_help=False,
        details="""\
Two folders: the page is report-beside-RUN.html in the second one, with the curves of both laid over each other.""",
    ),
    "export": Command(
        "RUN_FOLDER --out FOLDER [--step N] [--model student|discriminator]",
        "a checkpoint as a Hugging Face directory",
        "gadcore.checkpoint.export_command:main",
    ),
    "doctor-d": Command(
        "[RUN_FOLDER] [--noise]",
        f"what is wrong with a run's discriminator, and the setting that mends it (default {LATEST})",
        "gadcore.run:doctor_d_main",
        own_help=False,
        details=DOCTOR_D,
    ),
    "serve": Command(
        "[RUN_FOLDER] [--port N]", "the student behind vLLM's OpenAI server", "gadcore.evaluate.serve_command:main"
    ),
    "serve-discriminator": Command(
        "[settings]",
        "a discriminator that other trainers ask for rewards, and train, over HTTP",
        "gadcore.integrations.service.command:main",
        prepared=True,
    ),
    "doctor": Command(
        "[--json]",
        "what is here for a run, what is missing, and what mends it",
        "gadcore.doctor.command:main",
        own_help=False,
    ),
    "chat": Command("[RUN_FOLDER]", "talk to the student in this terminal", "gadcore.evaluate.chat_command:main"),
}
EXAMPLES = """\
  gadcore                                           the default job, preset smollm2-cpu; on a GPU smollm2-gpu
  gadcore data answers.jsonl                        look at rows of your own
  gadcore --preset qwen2.5-3b --data.train answers.jsonl
  gadcore --config mine.toml --dry-run              print the resolved plan and stop
  gadcore --resume auto                             go on with the newest run
  gadcore COMMAND --help                            every setting of a command: gadcore train --help"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit code: 0, 2 for bad input, 128 + signal where one stopped the run."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] and arguments[0] in ("help", "--version", *HELP):
        return _about(arguments)
    command = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "train"
    signals = None
    try:
        if command not in COMMANDS:
            near = loading.nearest(command, COMMANDS)
            hint = f"did you mean {near}?" if near else f"use one of {', '.join(COMMANDS)}, or --help"
            raise UserError(f"unknown command {command!r}: {hint}")
        if command not in loading.TRAINING:
            if several_processes():
                raise UserError(f"{command} is a command of one process: start it without torchrun")
            return _other(command, arguments)
        signals = StopSignals()
        return _train(command, arguments, signals)
    except BaseException as error:
        if (found := _sentence(error, command, signals)) is None:
            raise
        return _told(*found)


def _sentence(error: BaseException, command: str, signals: StopSignals | None) -> tuple[str, int] | None:
    """(what the user is told of what ended a command, the exit code); None for an error of the program."""
    # What goes on with a run that has begun is said where its folder is known (gadcore.record.run_folder).
    goes_on = "give the same command again" if command in loading.TRAINING else "the same command goes on"
    stopped = 128 + ((signals and signals.received) or signal.SIGINT)
    if isinstance(error, UserError):
        return str(error), 2
    if isinstance(error, Interrupted):
        return str(error), stopped
    if isinstance(error, KeyboardInterrupt):
        return f"stopped at once; {goes_on}", stopped
    if isinstance(error, OSError) and is_users(error):
        return f"{error.filename or 'the run folder'}: {error.strerror}; mend that and {goes_on}", 2
    return None


def _told(text: str, code: int) -> int:
    """Tells the user; of several processes of a job one does, and all end."""
    if several_processes():
        # torchrun stops the others as soon as one ends, which is no reason to say less, or to end in another way.
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        # Only now: it loads torch.
        from gadcore.distributed.watch import Watch

        return Watch.join().told(text, code)
    # A list, as of all the rows that cannot be used, has a line an item.
    for line in f"gadcore: {text}".split("\n"):
        say(line, sys.stderr)
    return code


def program() -> None:
    """The program `gadcore`: main() of the command line, with streams that outlast their readers."""
    keep_writing()
    try:
        code = main()
    except Exception:
        if not several_processes():
            raise
        traceback.print_exc()
        code = 1
    leave(code)


def _about(arguments: Sequence[str]) -> int:
    """help, help COMMAND, --help, --version."""
    if arguments[0] == "--version":
        print(f"gadcore {__version__}")
        return 0
    if arguments[0] == "help" and len(arguments) > 1 and arguments[1] in COMMANDS:
        return main([arguments[1], "--help"])
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    print("\n".join(["gadcore [COMMAND] [settings]", "", *lines, "", EXAMPLES]))
    return 0


def _other(name: str, arguments: list[str]) -> int:
    """A command that trains nothing."""
    command = COMMANDS[name]
    if not command.own_help and any(argument in HELP for argument in arguments):
        details = f"\n\n{command.details}" if command.details else ""
        print(f"gadcore {name} {command.usage}\n\n{command.summary[0].upper()}{command.summary[1:]}.{details}")
        return 0
    module, _, function = command.function.partition(":")
    call: Callable[..., int] = getattr(importlib.import_module(module), function)
    return call(arguments, _prepare) if command.prepared else call(arguments)


def _prepare(config: Any) -> None:
    """config: of any command."""
    engine = getattr(config, "rollout", None) or getattr(config, "sampling", None)
    batch_invariant = getattr(engine, "batch_invariant", False)
    set_environment(config.run.threads, config.run.device, batch_invariant=batch_invariant)


def report_main(arguments: list[str]) -> int:
    """Writes report.html of a run again, or of two runs OTHER_RUN_FOLDER/report-beside-RUN.html."""
    if len(arguments) > 2 or any(argument.startswith("-") for argument in arguments):
        raise UserError(f"report takes one run folder, or two to lay side by side, not {' '.join(arguments)}")
    from gadcore.report.page import write_overlay, write_report

    folders = [Path(argument).expanduser() for argument in arguments] or [LATEST]
    say(write_overlay(folders[0], folders[1]) if len(folders) == 2 else write_report(folders[0]))
    return 0


def doctor_d_main(arguments: list[str]) -> int:
    """Examines the discriminator of a run, and writes its report again; 0, or 1 where something is wrong."""
    from gadcore.evaluate.doctor_d_command import main as examine
    from gadcore.report.page import write_report

    folder, wrong = examine(arguments, _prepare)
    say(write_report(folder))
    return int(wrong)


def _train(command: str, arguments: list[str], signals: StopSignals) -> int:
    arguments, dry_run = [a for a in arguments if a != "--dry-run"], "--dry-run" in arguments
    arguments = [a.replace("--resume", "--run.resume", 1) if a.split("=")[0] == "--resume" else a for a in arguments]
    arguments += _restarted(arguments)
    saved = _saved_config(arguments)
    default = loading.DEFAULT_PRESET if saved else default_preset(arguments)
    config = loading.load(arguments, saved=saved, default=default, command=command)
    if default == GPU_PRESET and os.environ.get("RANK", "0") == "0":
        say(
            f"gadcore: no preset is named and there is a GPU: --preset {GPU_PRESET}; --run.device cpu means "
            f"{loading.DEFAULT_PRESET}",
            sys.stderr,
        )
    check_tracker(config.tracking.tracker)
    check_files(config, new=not dry_run)
    _prepare(config)
    # Only now: torch reads the environment when it is loaded, and these functions load it.
    from gadcore.rollout.engine import check_own_engine

    check_named(config)
    check_own_engine(config, int(os.environ.get("WORLD_SIZE", "1")))
    from gadcore.train.job import join_job

    return join_job(
        config,
        signals,
        lambda job: _train_in(job, job.config, command, signals, dry_run=dry_run),
        lambda error: _sentence(error, command, signals),
    )


def _train_in(job: Job, config: Config, command: str, signals: StopSignals, *, dry_run: bool) -> int:
    """A run, or its plan, in every process of a job."""
    from gadcore.algorithm import train
    from gadcore.doctor.command import at_start
    from gadcore.plan import disk
    from gadcore.plan.check import Fitted, fit
    from gadcore.report.page import last_words, write_report
    from gadcore.train.ahead import check_elsewhere
    from gadcore.train.build import build
    from gadcore.train.data_command import warning_panel, wide
    from gadcore.train.inputs import describe_plan, planned_steps, read_inputs
    from gadcore.train.progress import stages_of
    from gadcore.train.resuming import finished

    world = job.world
    stages = stages_of(config, command)
    check_elsewhere(config)
    if config.run.resume == "auto" and not dry_run and (path := job.of_first(lambda: finished(config, stages))):
        if world.is_first:
            # It may have been killed in between.
            if not (path / "report.html").exists():
                clear_temporaries(path, "report.html")
                write_report(path)
            say(
                f"the run {path} is finished, there is nothing to do: go back to a checkpoint by --resume step-.., or "
                f"start a new run from its student (--student.model {shlex.quote(f'{path}/student')})"
            )
        return 0
    if world.is_first:
        at_start(config)
    # Before there is a folder: bad data leaves nothing behind.
    inputs = read_inputs(config, stages, world)
    if inputs.warnings and world.is_first:
        wide(Console(stderr=True, markup=False, emoji=False, highlight=False)).print(warning_panel(inputs.warnings))
    refused = None
    try:
        fitted = job.of_first(lambda: fit(config, inputs.student.path, inputs.train, stages, world))
    except UserError as error:
        if not dry_run:
            raise
        fitted, refused = Fitted(config, [], [], {}), error
    config = fitted.config
    inputs.notes.extend([*job.notes, *fitted.notes])
    needed = disk.predict(config, inputs.student.path, planned_steps(config, stages, inputs))
    if needed is not None:
        inputs.notes.append(needed.sentence())
    if dry_run:
        lines = f"{loading.dump(config)}\n{describe_plan(config, stages, inputs)}".split("\n")
        for line in [*lines, *fitted.lines] if world.is_first else []:
            say(line)
        if refused is not None:
            raise refused
        return 0
    if needed is not None and not config.run.resume:
        job.of_first(lambda: disk.check(needed, Path(config.run.dir or RUNS)))
    stop = job.agreed_stop()
    with (
        job.folder(config) as folder,
        build(config, stages, inputs, folder, stop_requested=stop, world=world, pace=fitted.step_seconds) as trainer,
    ):
        job.follows(trainer.where)
        signals.finish_steps()
        summary = train(trainer)
        if world.is_first:
            write_report(folder.path)
        trainer.records.finished(summary)
        sentences = last_words(folder.path) if world.is_first else []
    # Once the view is closed.
    for sentence in sentences:
        say(sentence)
    return 0


def _restarted(arguments: list[str]) -> list[str]:
    """What has a job that torchrun starts again (--max-restarts) go on with its run, which --run.dir names."""
    directory = split(arguments, setting_kinds(Config))[1].get("run.dir", "none")
    begun = directory != "none" and (Path(directory).expanduser() / "config.toml").is_file()
    return ["--run.resume", "auto"] if begun and restarts() else []


def _saved_config(arguments: list[str]) -> Path | None:
    """The settings that a run which is resumed began with; None where another file or preset is named."""
    bases, overrides = split(arguments, setting_kinds(Config))
    resume, directory = (overrides.get(key, "none") for key in ("run.resume", "run.dir"))
    if bases or resume.lower() == "none":
        return None
    given = None if directory.lower() == "none" else str(Path(directory).expanduser())
    return RunFolder.existing(given).path / "config.toml"


if __name__ == "__main__":
    program()
