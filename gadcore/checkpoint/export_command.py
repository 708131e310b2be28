"""gadcore export RUN_FOLDER --out FOLDER [--step N] [--model student|discriminator] [--dtype D] [--push NAME]"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from gadcore.errors import UserError
from gadcore.text import say

MODELS = ("student", "discriminator")
DTYPES = ("float32", "bfloat16", "float16")


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns the exit code. Raises UserError for whatever the user has to mend."""
    options = _parser().parse_args(arguments)
    # Only now: it loads torch.
    from gadcore.checkpoint import store
    from gadcore.checkpoint.export import export

    folder, out = Path(options.run).expanduser(), Path(options.out).expanduser()
    if not (folder / "config.toml").is_file():
        raise UserError(f"{folder} is no run folder, it has no config.toml: give one, for example runs/latest")
    if out.resolve() == Path.cwd():
        raise UserError(f"--out {options.out} is the folder that you are in: name a new one")
    found = store.available(folder / "checkpoints")
    if not found:
        raise UserError(
            f"{folder} has no checkpoints: set checkpoint.every for the next run; a finished run has its last "
            "models in student/ and discriminator/"
        )
    step = max(found) if options.step is None else options.step
    if step not in found:
        raise UserError(f"--step {step}: {folder} has checkpoints of the steps {', '.join(map(str, found))}")
    export(found[step], out, options.model, options.dtype)
    say(f"{options.out}: the {options.model} of step {step}")
    if options.push:
        say(_push(out, options.push))
    return 0


def _push(folder: Path, name: str) -> str:
    """Uploads a model's folder to the hub, as a private repository; returns its address. HF_TOKEN, or the token that
    `hf auth login` keeps, is whose it is."""
    from httpx import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    from gadcore.errors import cause

    api = HfApi()
    try:
        address = str(api.create_repo(name, private=True, exist_ok=True))
        api.upload_folder(folder_path=folder, repo_id=name)
    except (HTTPError, HFValidationError, HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled) as error:
        raise UserError(f"{folder} is written, but --push {name} failed: {cause(error)}") from error
    return address


def _step(text: str) -> int:
    """A number, or the name of a checkpoint's folder, as --run.resume takes it."""
    found = re.fullmatch(r"(?:step-)?(\d{1,18})", text, re.ASCII)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no step: write a number, or a checkpoint's name as step-000100")
    return int(found[1])


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"export: {message}; see export --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="gadcore export", description="A checkpoint as a Hugging Face directory.")
    parser.add_argument("run", metavar="RUN_FOLDER")
    parser.add_argument("--step", type=_step, help="the checkpoint's, as 100 or step-000100; default the newest")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="a new or empty folder")
    parser.add_argument("--model", choices=MODELS, default="student", help="default student")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; default the run's")
    parser.add_argument("--push", metavar="NAME", help="upload it to the hub, as the private repository NAME")
    return parser
