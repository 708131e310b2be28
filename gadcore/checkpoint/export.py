"""python -m gadcore.run export RUN_FOLDER --out FOLDER [--step N] [--model student|discriminator]

A checkpoint of a run as an ordinary Hugging Face directory: safetensors, config, generation config, tokenizer. vLLM
serves it, and gadcore.run trains or evaluates it, as any other model. Without --step the newest checkpoint is taken.
Architecture, config and tokenizer are those of the model that the run was started from.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch

from gadcore.checkpoint import store
from gadcore.checkpoint.state import restore_parameters
from gadcore.config import loading
from gadcore.config.device import quiet
from gadcore.config.settings import Config
from gadcore.errors import UserError
from gadcore.files import whole_folder
from gadcore.models.loading import PreTrainedModel, load_causal_lm, load_discriminator, save_model
from gadcore.models.spec import ModelSpec

MODELS = ("student", "discriminator")


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns the exit code. Raises UserError for whatever the user has to mend."""
    options = _parser().parse_args(arguments)
    folder = Path(options.run)
    if not (folder / "config.toml").is_file():
        raise UserError(f"{folder} is no run folder, it has no config.toml: give one, for example runs/latest")
    found = store.available(folder / "checkpoints")
    if not found:
        raise UserError(
            f"{folder} has no checkpoints: set checkpoint.every for the next run; a finished run has its last "
            "models in student/ and discriminator/"
        )
    step = max(found) if options.step is None else options.step
    if step not in found:
        raise UserError(f"--step {step}: {folder} has checkpoints of the steps {', '.join(map(str, found))}")
    export(found[step], Path(options.out), options.model)
    print(f"{options.out}: the {options.model} of step {step}")
    return 0


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint of a run, or was one before files of it were lost."""
    return (folder / store.MANIFEST).is_file()


def export(saved: Path, out: Path, which: str = "student") -> None:
    """Writes a model of the checkpoint in `saved`, <run folder>/checkpoints/<name>, to the folder `out`.

    out is whole or not there; it may exist if it is empty.
    Raises UserError where out holds something, where the checkpoint is damaged or lies in no run folder, where it has
    no such model, or where it does not fit the model that the run's settings name.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty: choose another folder")
    quiet()
    config = config_of(saved)
    tensors = store.load(saved).tensors
    if which not in tensors:
        raise UserError(f"{saved} has no {which}: a run of seqkd trains none; export its student")
    spec = ModelSpec.resolve(
        _name(config, which), system_prompt=config.data.system_prompt, arguments=config.data.template_arguments
    )
    model = _untrained(config, which, spec)
    restore_parameters(dict(model.named_parameters()), tensors[which], which)
    with whole_folder(out) as folder:
        save_model(model, spec.tokenizer, folder)


@contextmanager
def as_directory(path: str, place: Path) -> Iterator[str]:
    """The model at `path` as a directory or hub id: of a checkpoint the student, in `place` as long as the block runs.

    What a killed process has left in `place` is replaced.
    """
    if not is_checkpoint(Path(path)):
        yield path
        return
    shutil.rmtree(place, ignore_errors=True)
    try:
        export(Path(path), place)
        yield str(place)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def config_of(saved: Path) -> Config:
    """The settings of the run that a checkpoint folder belongs to. Raises UserError where it lies in no run folder."""
    path = saved.resolve().parent.parent / "config.toml"
    if not path.is_file():
        raise UserError(f"{saved} lies in no run folder (there is no {path}): leave checkpoints where they were made")
    return loading.load(["--config", str(path)])


def _name(config: Config, which: str) -> str:
    return config.student.model if which == "student" else config.discriminator_model


def _untrained(config: Config, which: str, spec: ModelSpec) -> PreTrainedModel:
    """The model as the run loaded it, so that what is no parameter comes with it."""
    cpu = torch.device("cpu")
    if which == "student":
        return load_causal_lm(spec.path, config.student.dtype, cpu)
    return load_discriminator(
        spec.path,
        config.discriminator.dtype,
        device=cpu,
        seed=config.run.seed,
        end_id=spec.template.end_id,
        tokenizer=spec.tokenizer,
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"export: {message}; see export --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m gadcore.run export", description="A checkpoint as a Hugging Face directory.")
    parser.add_argument("run", metavar="RUN_FOLDER")
    parser.add_argument("--step", type=int, help="the checkpoint's step; default the newest")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="a new or empty folder")
    parser.add_argument("--model", choices=MODELS, default="student", help="default student")
    return parser
