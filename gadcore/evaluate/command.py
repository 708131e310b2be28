"""python -m gadcore.run eval: responses of models to sets of prompts, and how teacher-like they are.

    python -m gadcore.run eval --eval.models "before=smollm2-135m-instruct,gad=runs/latest" \\
        --eval.in_domain "test=test.jsonl" --eval.out_of_domain "vicuna=vicuna.jsonl" --eval.out runs/eval

Responses are on disk as they come. Those that eval.out holds are not drawn again, and tests that it holds are not made
again: the same command goes on where it was stopped, and takes in the results that a judge has left there meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from gadcore.config import loading
from gadcore.data.sources import Source
from gadcore.errors import UserError
from gadcore.evaluate.responses import write_json
from gadcore.evaluate.settings import EvalConfig
from gadcore.files import LOCK, clear_temporaries, held, write_whole
from gadcore.text import say


def main(arguments: Sequence[str], prepare: Callable[[EvalConfig], None] | None = None) -> int:
    """Runs the command; returns the exit code. Raises UserError for whatever the user has to mend.

    prepare: called with the settings before torch is loaded.
    """
    config = loading.load(arguments, EvalConfig)
    chosen = config.eval
    if not chosen.models:
        raise UserError("no model to evaluate: give eval.models, for example --eval.models NAME=RUN_FOLDER")
    if not chosen.in_domain and not chosen.out_of_domain:
        raise UserError("no prompts to evaluate on: give eval.in_domain or eval.out_of_domain, NAME=SOURCE")
    for name, each in (*chosen.in_domain.items(), *chosen.out_of_domain.items()):
        try:
            Source.check(each.source)
        except UserError as error:
            raise UserError(f"set {name}: {error}") from None
    if prepare is not None:
        prepare(config)
    evaluate(config)
    return 0


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Samples what is missing, measures, writes evaluation.json and evaluation.md; returns the former's content."""
    # Imported only now: torch reads the environment when it is loaded.
    from gadcore.checkpoint.export import as_directory
    from gadcore.config.device import device_of, quiet
    from gadcore.evaluate.fresh_text import TextTest
    from gadcore.evaluate.measure import measure_set
    from gadcore.evaluate.run_limits import with_run_columns, with_run_limits
    from gadcore.evaluate.sampling import all_sets, exported, find_model, sample_all
    from gadcore.evaluate.table import NAME, markdown

    quiet()
    config = with_run_columns(with_run_limits(config, _log), _log)
    device = device_of(config.as_run())
    for note in config.without_effect(device.type):
        _log(note)
    out = Path(config.eval.out)
    names = list(config.eval.models)
    sets: dict[str, Any] = {}
    notes: list[str] = []
    with ExitStack() as stack:
        stack.enter_context(held(out / LOCK, f"the folder {out}"))
        for folder in (out, *(out / name for name in all_sets(config))):
            clear_temporaries(folder)
        fresh = None
        if config.fresh.enabled:
            base = find_model(config.fresh.model or config.eval.models[names[0]])
            path = stack.enter_context(as_directory(base, exported(out, "fresh-base")))
            fresh = TextTest(path, config.fresh, device, _log).run
        sample_all(config, device, _log)
        for name, chosen in all_sets(config).items():
            _log(f"measuring {name}")
            results, differences, prompts = measure_set(out / name, names, resamples=config.eval.resamples, fresh=fresh)
            sets[name] = {
                "domain": "in" if name in config.eval.in_domain else "out",
                "source": chosen.source,
                "prompts": prompts,
                "results": results,
                "differences": differences,
            }
            notes += _notes(out / name, names)
        evaluation = {
            "models": config.eval.models,
            "sets": sets,
            "notes": notes,
            "settings": config.model_dump(exclude={"eval"}),
        }
        write_json(out / f"{NAME}.json", evaluation)
        write_whole(out / f"{NAME}.md", markdown(evaluation))
    _log(f"{out / NAME}.md")
    return evaluation


def _notes(folder: Path, models: Sequence[str]) -> list[str]:
    """What happened to a set's rows, said once where it happened to all models alike."""
    from gadcore.evaluate.sampling import sampled

    noted: dict[str, list[str]] = {}
    for model in models:
        record = folder / f"sampled-{model}.json"
        for note in sampled(record).notes if record.is_file() else ():
            noted.setdefault(note, []).append(model)
    return [
        f"{folder.name}: {note}" if who == list(models) else f"{folder.name}, {' and '.join(who)}: {note}"
        for note, who in noted.items()
    ]


def _log(line: str) -> None:
    say(line)
