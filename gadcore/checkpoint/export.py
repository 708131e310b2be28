"""A checkpoint of a run as an ordinary Hugging Face directory: safetensors, config, generation config, tokenizer.

vLLM serves it, and gadcore trains or evaluates it, as any other model. Architecture, config and tokenizer are those of
the model that the run was started from.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gadcore.checkpoint import bases, store
from gadcore.checkpoint.card import model_card
from gadcore.checkpoint.shards import ShardedTensors
from gadcore.config import loading
from gadcore.config.adapter import lora_of
from gadcore.config.device import quiet
from gadcore.config.settings import Config
from gadcore.errors import UserError
from gadcore.files import LOCK, held, parse_json, whole_folder, write_whole
from gadcore.models.adapter import is_adapted, merge_adapter, own_parameters
from gadcore.models.learner import ADAPTER
from gadcore.models.loading import PreTrainedModel, load_causal_lm, save_model, without_weights
from gadcore.models.peft_format import write_adapter
from gadcore.models.shared_base import SharedBase, load_scorer
from gadcore.models.spec import ModelSpec
from gadcore.models.state import check_parameters, copy_into
from gadcore.models.streaming import save_streamed


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint of a run, or was one before files of it were lost."""
    return (folder / store.MANIFEST).is_file()


def export(saved: Path, out: Path, which: str = "student", dtype: str | None = None) -> None:
    """Writes a model of the checkpoint in `saved`, <run folder>/checkpoints/<name>, and its card to the folder `out`.

    out is whole or not there; it may exist if it is empty. dtype: of the weights, "float32", "bfloat16" or "float16";
    default the run's. Where a model has adapters, they are part of the weights, and lie beside them in ADAPTER.
    Raises UserError where out holds something, where the checkpoint is damaged or lies in no run folder, where it has
    no such model, or where it does not fit the model that the run's settings name.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty: choose another folder")
    quiet()
    config = config_of(saved)
    checkpoint = store.load(saved)
    tensors = checkpoint.tensors
    if which not in tensors:
        raise UserError(f"{saved} has no {which}: the baselines train none; export its student")
    spec = ModelSpec.resolve(
        _name(config, which), system_prompt=config.data.system_prompt, arguments=config.data.template_arguments
    )
    saved_as = tensors[which]
    adapted = lora_of(config.student if which == "student" else config.discriminator) is not None
    # A model of a base and an adapter is put together as a whole, whoever has written the adapter.
    sharded = isinstance(saved_as, ShardedTensors) and not adapted
    model = _shell(config, which, spec) if sharded else _untrained(config, which, spec)
    bases.check(checkpoint.state.get("bases"), bases.describe({which: model}), {which: spec.path})
    check_parameters(own_parameters(model), saved_as, which)
    if not sharded:
        copy_into(own_parameters(model), saved_as)
    place = Path(os.path.abspath(out))
    with held(place.with_name(f"{LOCK}-{place.name[:40]}"), f"the folder {out}"):
        try:
            with whole_folder(place) as folder:
                if is_adapted(model):
                    (folder / ADAPTER).mkdir()
                    write_adapter(model, folder / ADAPTER)
                    merge_adapter(model, None if dtype is None else getattr(torch, dtype))
                if dtype is not None:
                    model.to(getattr(torch, dtype))
                if sharded:
                    # One tensor after the other: nobody may have room for all.
                    kinds = {name: tensor.dtype for name, tensor in model.named_parameters()}
                    save_streamed(model, spec.tokenizer, folder, lambda name: saved_as[name].to(kinds[name]))
                else:
                    save_model(model, spec.tokenizer, folder)
                write_whole(folder / "README.md", _card(saved, config, which, checkpoint, spec))
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise UserError(f"{out} was filled by somebody else meanwhile: choose another folder") from None


@contextmanager
def as_directory(path: str, place: Path) -> Iterator[str]:
    """The model at `path` as a directory or hub id: of a checkpoint the student, in `place` while the block runs."""
    if not is_checkpoint(Path(path)):
        yield path
        return
    try:
        export(Path(path), place)
        yield str(place)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def config_of(saved: Path) -> Config:
    """The settings of the run that a checkpoint folder belongs to. Raises UserError where it lies in no run folder."""
    return loading.load(["--config", str(config_path(saved))])


def config_path(saved: Path) -> Path:
    """Where they are; raises UserError as config_of() does."""
    path = saved.resolve().parent.parent / "config.toml"
    if not path.is_file():
        raise UserError(f"{saved} lies in no run folder (there is no {path}): leave checkpoints where they were made")
    return path


def _card(saved: Path, config: Config, which: str, checkpoint: store.Checkpoint, spec: ModelSpec) -> str:
    progress = checkpoint.state["progress"]
    end = str(spec.tokenizer.decode(list(spec.template.response_ids("", finished=True))))
    run = saved.resolve().parent.parent
    figures = _figures_of(run / "metrics.jsonl", progress["step"])
    return model_card(config, which, progress | _last_evaluations(run, checkpoint), end=end, figures=figures)


def _last_evaluations(run: Path, checkpoint: store.Checkpoint) -> dict[str, Any]:
    """What a run measured after its last checkpoint, where this is the one; nothing where it has no summary to read."""
    try:
        summary = parse_json((run / "summary.json").read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(summary, dict) or checkpoint.state["progress"]["done"] != summary.get("stages"):
        return {}
    return {"evaluations": summary.get("evaluations") or {}}


def _figures_of(metrics: Path, step: int) -> Mapping[str, float]:
    """The line of a step in a run's metrics.jsonl; nothing where it is not there, or not to be read."""
    try:
        rows = [parse_json(line) for line in metrics.read_bytes().splitlines()]
    except (OSError, ValueError):
        return {}
    return next((row for row in reversed(rows) if isinstance(row, dict) and row.get("step") == step), {})


def _name(config: Config, which: str) -> str:
    return config.student.model if which == "student" else config.discriminator_model


def _untrained(config: Config, which: str, spec: ModelSpec) -> PreTrainedModel:
    """The model as the run loaded it, so that what is no parameter comes with it."""
    cpu = torch.device("cpu")
    if which == "student":
        settings = config.student
        if lora_of(settings) is None:
            return load_causal_lm(spec.path, settings.dtype, cpu)
        return SharedBase.load(spec, settings, cpu).policy(settings, seed=config.run.seed)
    return load_scorer(spec, config.discriminator, device=cpu, seed=config.run.seed, tokenizer=spec.tokenizer)


def _shell(config: Config, which: str, spec: ModelSpec) -> PreTrainedModel:
    """The model without weights, which are read one by one."""
    if which == "student":
        return without_weights(spec.path, config.student.dtype)
    return without_weights(spec.path, config.discriminator.dtype, end_id=spec.template.end_id, tokenizer=spec.tokenizer)
