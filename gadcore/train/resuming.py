"""What a run that goes on must find as it was, looked at before anything slow is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import xxhash

from gadcore.checkpoint import store
from gadcore.checkpoint.store import Checkpoint
from gadcore.config.settings import Config
from gadcore.data.encoded import row_digests
from gadcore.data.groups import Group
from gadcore.distributed.world import World
from gadcore.errors import UserError
from gadcore.record.run_folder import RunFolder
from gadcore.train.agreement import of_first
from gadcore.train.inputs import Inputs
from gadcore.train.progress import Progress, other_stages


def fingerprints(inputs: Inputs) -> dict[str, str]:
    """Of the rows of a run: {"train": .., "eval": ..}."""
    return {"train": fingerprint(inputs.train), "eval": fingerprint(inputs.held_out)}


def fingerprint(groups: Sequence[Group]) -> str:
    """Changes with the rows, their order, and what template, tokenizer and limits make of them."""
    # Making a million groups takes minutes, and a checkpoint waits for it.
    if (kept := row_digests(groups)) is not None:
        return xxhash.xxh3_128_hexdigest(kept.tobytes())
    digest = xxhash.xxh3_128()
    for group in groups:
        prompt, teacher = group.prompt, group.teacher
        texts = json.dumps([prompt.index, prompt.messages, teacher.text, teacher.finished]).encode()
        ids = np.asarray([len(texts), len(prompt.token_ids), *prompt.token_ids, *teacher.token_ids], dtype=np.int64)
        digest.update(texts)
        digest.update(ids.tobytes())
    return digest.hexdigest()


def finished(config: Config, stages: Sequence[str]) -> Path | None:
    """The folder of the run to resume where it is finished. UserError where it is a run of other stages."""
    folder = RunFolder.existing(config.run.dir)
    summary = folder.summary()
    if summary is None:
        return None
    if (theirs := summary.get("stages")) != list(stages):
        raise UserError(other_stages(folder.path, theirs if isinstance(theirs, list) else [], stages))
    return folder.path


def chosen(folder: RunFolder, resume: str) -> Path | None:
    """The checkpoint that run.resume asks for; None where "auto" finds none. UserError where a named one is missing."""
    if resume == "auto":
        return store.latest(folder.checkpoints)
    found, step = store.available(folder.checkpoints), int(resume.removeprefix("step-"))
    if step not in found:
        there = ", ".join(path.name for path in found.values()) or "none"
        raise UserError(f"run.resume = {resume}: {folder.checkpoints} has no such checkpoint, there are: {there}")
    return found[step]


def check(config: Config, data: Mapping[str, str], folder: RunFolder, saved: Checkpoint) -> list[str]:
    """Raises UserError where rows or records are not those that the checkpoint counts on; notes, in sentences.

    data: fingerprints of this run's rows.
    """
    progress = saved.state.get("progress", {})
    in_gad = progress.get("stage") == "gad" and progress["stage_step"] > 0 and "gad" not in progress["done"]
    if in_gad and config.algorithm.kl_coef > 0 and store.latest(folder.reference) is None:
        raise UserError(
            f"the reference policy is missing from {folder.reference}: put it back, go back to a checkpoint of the "
            "warmup (--resume step-..), or start a new run"
        )
    records = saved.state.get("records")
    before = saved.state.get("data")
    if records is None or before is None:
        return ["an older gadcore wrote this checkpoint, which does not say with which rows: they are not compared"]
    for key, rows in (("train", "training"), ("eval", "held-out")):
        if before[key] != data[key]:
            raise UserError(
                f"the {rows} rows are not those of the checkpoint of step {saved.step} (data.{key} = "
                f"{getattr(config.data, key)}): put the rows, and the settings in data.* that shorten them, back as "
                "they were, or start a new run"
            )
    try:
        folder.check(saved.step, records, saved.state.get("digests", {}))
    except UserError as error:
        earlier = [path.name for step, path in store.available(folder.checkpoints).items() if step < saved.step]
        back = f"go back to a checkpoint that needs less of it (--resume {' or '.join(earlier)}), " if earlier else ""
        raise UserError(
            f"{error}, and the checkpoint of step {saved.step} counts on it: put the file back as it was, {back}"
            "or export the checkpoint and start a new run from it"
        ) from None
    return []


def go_back(world: World, folder: RunFolder, progress: Progress) -> list[str]:
    """What came after the checkpoint that `progress` is of is set aside, so that the run goes on from here whenever it
    is stopped. The sentence to tell, [] where there was nothing."""
    step = progress.step
    aside, kept = of_first(
        world,
        lambda: (folder.go_back(step, progress.evaluations), store.abandon_after(folder.checkpoints, step)),
    )
    told = ", ".join(map(str, filter(None, (aside, *kept))))
    return [f"what came after step {step} is set aside: {told}"] if told else []
