"""The command line: python -m gadcore.run [COMMAND] [settings].

python -m gadcore.run                                   the default job, preset smollm2-cpu
python -m gadcore.run --preset qwen2.5-7b --data.train answers.jsonl
python -m gadcore.run --config mine.toml --dry-run      print the resolved plan and stop
python -m gadcore.run --resume auto                     go on with the newest run
python -m gadcore.run seqkd ...                         the baseline: cross-entropy only
python -m gadcore.run plan ...                          what a run will need: memory, time, does it fit
python -m gadcore.run data FILE                         what a run would read of FILE: rows, lengths, examples
python -m gadcore.run report [RUN_FOLDER]               write report.html again
python -m gadcore.run export RUN_FOLDER --out FOLDER    a checkpoint as a Hugging Face directory
python -m gadcore.run collect ...                       ask a teacher for responses, over an API
python -m gadcore.run eval ...                          sample from models and compare them with the teacher
python -m gadcore.run judge | compare ...               ratings, or wins, by an LLM judge on what eval sampled
python -m gadcore.run sheet | tally ...                 the same by people, blind
python -m gadcore.run [COMMAND] --help                  every setting
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from gadcore.config import loading
from gadcore.config.command_line import HELP, setting_kinds, split
from gadcore.config.functions import check_functions
from gadcore.config.settings import Config
from gadcore.errors import Interrupted, UserError
from gadcore.evaluate.settings import EvalConfig
from gadcore.record.run_folder import LATEST, RunFolder

STAGES = {"train": ("warmup", "gad"), "seqkd": ("seqkd",)}
COMMANDS = (*STAGES, "data", "plan", "report", "export", "collect", "eval", "judge", "compare", "sheet", "tally")


class StopSignals:
    """Remembers SIGTERM and Ctrl-C, so that the step at work is finished; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        signal.signal(signal.SIGTERM, self._receive)
        signal.signal(signal.SIGINT, self._receive)

    def _receive(self, number: int, frame: object) -> None:
        self.received = number
        print("gadcore: finishing the step, then saving; Ctrl-C again stops at once", file=sys.stderr)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def reason(self) -> str | None:
        return None if self.received is None else signal.Signals(self.received).name


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit code: 0, 2 for bad input, 128 + signal where one stopped the run."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "train"
    goes_on = "go on with --resume auto" if command in STAGES else "the same command goes on"
    received = None
    try:
        if command not in COMMANDS:
            raise UserError(f"unknown command {command!r}: use one of {', '.join(COMMANDS)}, or --help")
        if command not in STAGES:
            return _other(command, arguments)
        signals = StopSignals()
        try:
            return _train(command, arguments, signals)
        finally:
            received = signals.received
    except UserError as error:
        print(f"gadcore: {error}", file=sys.stderr)
        return 2
    except Interrupted as error:
        print(f"gadcore: {error}", file=sys.stderr)
        return 128 + (received or signal.SIGINT)
    except KeyboardInterrupt:
        print(f"gadcore: stopped at once; {goes_on}", file=sys.stderr)
        return 128 + signal.SIGINT
    except OSError as error:
        # A full disk (which names no file) or a folder that may not be written is the user's to mend.
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        where = error.filename or "the run folder"
        print(f"gadcore: {where}: {error.strerror}; mend that and {goes_on}", file=sys.stderr)
        return 2


def _other(command: str, arguments: list[str]) -> int:
    """A command that trains nothing. Each is imported only when it is asked for."""
    if command == "report":
        return _report(arguments)
    if command == "data":
        from gadcore.train.data_command import main as data

        return data(arguments, set_environment)
    if command == "plan":
        from gadcore.plan.command import main as plan

        return plan(arguments, set_environment)
    if command == "export":
        from gadcore.checkpoint.export import main as export

        return export(arguments)
    if command == "collect":
        from gadcore.teacher.command import main as collect

        return collect(arguments)
    if command == "eval":
        from gadcore.evaluate.command import main as evaluate

        return evaluate(arguments, set_environment)
    if command in ("sheet", "tally"):
        from gadcore.evaluate.human_command import sheet_main, tally_main

        return sheet_main(arguments) if command == "sheet" else tally_main(arguments)
    from gadcore.evaluate.judge_command import compare_main, judge_main

    return judge_main(arguments) if command == "judge" else compare_main(arguments)


def _report(arguments: list[str]) -> int:
    if any(argument in HELP for argument in arguments):
        print(f"python -m gadcore.run report [RUN_FOLDER]\n\nWrites report.html of a run again; default {LATEST}.")
        return 0
    if len(arguments) > 1:
        raise UserError(f"report takes one run folder, not {' '.join(arguments)}")
    from gadcore.report.page import write_report

    print(write_report(Path(arguments[0]) if arguments else LATEST))
    return 0


def _train(command: str, arguments: list[str], signals: StopSignals) -> int:
    arguments, dry_run = [a for a in arguments if a != "--dry-run"], "--dry-run" in arguments
    arguments = [a.replace("--resume", "--run.resume", 1) if a.split("=")[0] == "--resume" else a for a in arguments]
    config = loading.load(arguments, saved=_saved_config(arguments))
    set_environment(config)
    # Only now: torch reads the environment when it is loaded, and these functions load it.
    check_functions(config.algorithm)
    from gadcore.algorithm import train
    from gadcore.plan.command import ledger_lines, memory_warning
    from gadcore.report.page import write_report
    from gadcore.train.build import build
    from gadcore.train.data_command import warning_panel, wide
    from gadcore.train.inputs import describe_plan, has_discriminator, read_inputs

    stages = STAGES[command]
    # Before there is a folder: bad data leaves nothing behind.
    inputs = read_inputs(config, stages)
    if inputs.warnings:
        wide(Console(stderr=True, markup=False, emoji=False, highlight=False)).print(warning_panel(inputs.warnings))
    if dry_run:
        print(f"{loading.dump(config)}\n{describe_plan(config, stages, inputs)}")
        if has_discriminator(stages):
            print("\n".join(ledger_lines(config, inputs.student.path, inputs.train)))
        return 0
    folder = RunFolder.existing(config.run.dir) if config.run.resume else RunFolder.create(config)
    with build(config, stages, inputs, folder, stop_requested=signals.reason) as trainer:
        if has_discriminator(stages):
            limit = trainer.memory.ledger.limit
            if warning := memory_warning(config, inputs.student.path, inputs.train, limit):
                trainer.records.message(warning)
        summary = train(trainer)
        write_report(folder.path)
        trainer.records.finished(summary)
    return 0


def _saved_config(arguments: list[str]) -> Path | None:
    """The settings that a run which is resumed began with; None where another file or preset is named."""
    bases, overrides = split(arguments, setting_kinds(Config))
    resume, directory = (overrides.get(key, "none") for key in ("run.resume", "run.dir"))
    if bases or resume.lower() == "none":
        return None
    return RunFolder.existing(None if directory.lower() == "none" else directory).path / "config.toml"


def set_environment(config: Config | EvalConfig) -> None:
    """What must be set before torch is imported."""
    if config.run.threads:
        os.environ["OMP_NUM_THREADS"] = str(config.run.threads)
    # Spinning threads slow each other down on a machine that does anything else; a short spin bridges the gaps between
    # the many small regions of sampling. A longer one gains little on an idle machine and loses much on a busy one.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    # torch's tensors in large pages: a training step would feel fresh memory being taken page by page.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # oneDNN keeps a compiled product for each of many shapes. Those of ragged batches seldom come back, so on real text
    # a process would grow step by step. The layers of a pass share theirs, so a few are enough.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    # The same bits for the same input, wherever an array happens to lie: a resumed run repeats the one it goes on with.
    os.environ.setdefault("MKL_CBWR", "AUTO")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Advice from below torch's Python side (vLLM's memory policy) would tear the view of the run.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


if __name__ == "__main__":
    sys.exit(main())
