"""Draws responses to every prompt from every model, and keeps them as gadcore.evaluate.responses describes.

A model's responses to a set are written when all are there, with how they were made beside them
(sampled-<model>.json); until then those that are there stand in drawn-<model>.part. What is there already is not drawn
again.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from transformers import PreTrainedModel

from gadcore.checkpoint.export import as_directory, config_of, is_checkpoint
from gadcore.config.device import quiet
from gadcore.config.writing import to_toml
from gadcore.data.batches import build_prompts
from gadcore.data.columns import Advice, quoted
from gadcore.data.forms import RawRow
from gadcore.data.groups import Response
from gadcore.data.reasoning import of_student
from gadcore.data.rows import load_rows
from gadcore.data.template import ChatTemplate
from gadcore.errors import UserError
from gadcore.evaluate.child import in_process
from gadcore.evaluate.responses import ResponseRow, digest_of, write_json, write_responses
from gadcore.evaluate.settings import EvalConfig, SetSettings
from gadcore.files import checksum, temporary, write_whole
from gadcore.models.loading import load_causal_lm, resolve_model
from gadcore.models.spec import ModelSpec
from gadcore.record.reading import read_as
from gadcore.record.tracking import MetricsLog, Row, Scan, scan
from gadcore.rollout.engine import Done, Engine, SampleRequest, engine_class, make_engine
from gadcore.rollout.sampler import Sampler, derived_seed
from gadcore.rollout.weights import PlainWeights

Log = Callable[[str], None]


def find_model(value: str) -> str:
    """The model directory or hub id of a run folder (its student), a model directory, a bundled name or a hub id.

    A checkpoint folder of a run is its own: export.as_directory() makes a model directory of it.
    """
    folder = Path(value).expanduser()
    if is_checkpoint(folder):
        config_of(folder)
        return str(folder)
    if (folder / "config.toml").is_file():
        if not (folder / "student" / "config.json").is_file():
            raise UserError(f"the run {value} has no student yet: let it finish (--resume auto)")
        return str(folder / "student")
    return resolve_model(value)


def sample_all(config: EvalConfig, device: torch.device, log: Log) -> None:
    """Draws every response that is missing in eval.out. log: to be found by its name where vLLM runs on CUDA."""
    if not engine_class(config.as_run()).one_a_process(device.type):
        _draw(config, device, log, one_engine=False)
    elif next(_tasks(config), None) is not None:
        # Each draws for as many models as share its engine; what it took of the GPU is free when it ends.
        while not in_process(_draw_with_one_engine, config, device, log):
            pass


@dataclass(frozen=True)
class _Task:
    """What is missing of a model: rows and what the responses depend on, by set."""

    model: str
    path: str
    rows: dict[str, list[RawRow]]
    made_from: dict[str, dict[str, Any]]


def _tasks(config: EvalConfig) -> Iterator[_Task]:
    """In the order of eval.models, those that have one."""
    out = Path(config.eval.out)
    sets = {name: _load(name, settings, config) for name, settings in all_sets(config).items()}
    paths = {name: find_model(value) for name, value in config.eval.models.items()}
    for model, path in paths.items():
        weights = identity(path)
        made_from = {name: _made_from(config, weights, rows) for name, rows in sets.items()}
        missing = {name: sets[name] for name in sets if not _is_done(out / name, model, made_from[name])}
        if missing:
            yield _Task(model, path, missing, made_from)


def _draw_with_one_engine(config: EvalConfig, device: torch.device, log: Log) -> bool:
    quiet()
    return _draw(config, device, log, one_engine=True)


def _draw(config: EvalConfig, device: torch.device, log: Log, *, one_engine: bool) -> bool:
    """Draws what is missing; with one_engine only up to the first model that needs a second one. Returns whether
    nothing is missing any more."""
    out = Path(config.eval.out)
    sampler = _Sampler(config, device, log)
    try:
        for task in _tasks(config):
            with as_directory(task.path, exported(out, task.model)) as directory:
                if not sampler.use(directory, one_engine=one_engine):
                    return False
                for name, rows in task.rows.items():
                    log(f"sampling {len(rows) * config.eval.samples} responses of {task.model} to {name}")
                    _sample(sampler, rows, out / name, task.model, task.made_from[name], log)
        return True
    finally:
        sampler.close()


@dataclass(frozen=True)
class Sampled:
    """What sampled-<model>.json says of how responses were made."""

    made_from: dict[str, Any]
    notes: list[str]


_SAMPLED = TypeAdapter(Sampled)


def sampled(path: Path) -> Sampled:
    return read_as(_SAMPLED, path, "delete it and the responses beside it, and run eval again")


def exported(out: Path, name: str) -> Path:
    """Where a checkpoint is a model directory while eval needs it as one."""
    return temporary(out / name)


def all_sets(config: EvalConfig) -> dict[str, SetSettings]:
    """The sets in their order: in domain, then out of domain."""
    return config.eval.in_domain | config.eval.out_of_domain


def _load(name: str, settings: SetSettings, config: EvalConfig) -> list[RawRow]:
    told = partial(_with_columns, name, config)
    try:
        return load_rows(settings.source, settings.columns, settings.rows or config.eval.rows, split="eval", told=told)
    except UserError as error:
        raise UserError(f"set {name}: {error}") from None


def _with_columns(name: str, config: EvalConfig, advice: Advice) -> str:
    """The setting that gives a set its columns, the other sets of it included."""
    domain = "in_domain" if name in config.eval.in_domain else "out_of_domain"
    sets = {key: chosen.model_dump(exclude_unset=True) for key, chosen in getattr(config.eval, domain).items()}
    sets[name] |= {"columns": dict(advice.columns)}
    return f"name its columns by --eval.{domain} {quoted(to_toml(sets))}{advice.missing}"


def identity(path: str) -> str:
    """What changes when a model's weights do: a checksum, or the name of a model on the hub."""
    pattern = "student.safetensors" if is_checkpoint(Path(path)) else "*.safetensors"
    files = sorted(Path(path).glob(pattern))
    digest = hashlib.sha256(path.encode() if not files else b"")
    for file in files:
        digest.update(bytes.fromhex(checksum(file, "sha256")))
    return digest.hexdigest()[:32]


def _made_from(config: EvalConfig, weights: str, rows: list[RawRow]) -> dict[str, Any]:
    """Everything that the responses depend on."""
    text = digest_of([(row.messages, row.teacher_response) for row in rows])
    settings = {**config.data.model_dump(), "seed": config.run.seed}
    if not settings["template_arguments"]:
        # As before there were any: what is on disk without them is not drawn again.
        del settings["template_arguments"]
    if settings["reasoning"] == "keep":
        del settings["reasoning"]
    if config.eval.samples > 1:
        settings["samples"] = config.eval.samples
    settings |= {name: getattr(config.sampling, name) for name in ("temperature", "dtype")}
    return {"weights": weights, "rows": text, **settings}


def _is_done(folder: Path, model: str, made_from: dict[str, Any]) -> bool:
    responses, record = folder / f"{model}.jsonl", folder / f"sampled-{model}.json"
    if not responses.is_file():
        return False
    if not record.is_file():
        # Responses that another system wrote are there to be measured.
        return True
    _check_made_from(responses, sampled(record).made_from, made_from)
    return True


def _check_made_from(path: Path, before: dict[str, Any], made_from: dict[str, Any]) -> None:
    # Left out of what was made where they change nothing.
    keys = made_from.keys() | (before.keys() & {"samples", "reasoning"})
    if changed := sorted(key for key in keys if before.get(key) != made_from.get(key)):
        raise UserError(
            f"{path} was made with other {', '.join(changed)}: choose another eval.out, or delete it to draw the "
            "responses again"
        )


class _Sampler:
    """One engine at a time; models of one shape and vocabulary share it, since a start of vLLM takes long."""

    model: PreTrainedModel
    template: ChatTemplate

    def __init__(self, config: EvalConfig, device: torch.device, log: Log) -> None:
        self.config = config
        self.log = log
        self.run_config = config.as_run()
        self.device = device
        self.engine: Engine | None = None
        self._kind: tuple[str, str] | None = None
        self._path: str | None = None

    def use(self, path: str, *, one_engine: bool = False) -> bool:
        """From here on generate() samples from the model at `path`. With one_engine False, and nothing else, where that
        would take a second engine."""
        if path == self._path:
            return True
        data = self.config.data
        spec = ModelSpec.resolve(path, system_prompt=data.system_prompt, arguments=data.template_arguments)
        kind = _kind_of(spec)
        if one_engine and self.engine is not None and kind != self._kind:
            return False
        model = load_causal_lm(path, self.config.sampling.dtype, self.device)
        _check_context(model, path, self.run_config.context_tokens)
        self.template = spec.template
        for name in self.template.unused_arguments():
            self.log(f"  data.template_arguments: the chat template of {path} does not read {name}")
        for note in self.template.notes:
            self.log(f"  {note}")
        if self.engine is not None and kind == self._kind:
            with torch.no_grad():
                for mine, new in zip(self.model.parameters(), model.parameters(), strict=True):
                    mine.copy_(new)
        else:
            self.close()
            self.model, self._kind = model, kind
            self.engine = make_engine(self.run_config, path, model, self.template)
            for note in self.engine.notes:
                self.log(f"  {note}")
        self._path = path
        return True

    def generate(self, requests: list[SampleRequest], done: Done) -> None:
        """Draws the responses of every request; done is told of a request's as soon as they are there."""
        engine = self.engine
        if engine is None:
            raise RuntimeError("use() comes before generate()")
        sampler = Sampler(
            engine,
            PlainWeights(self.model),
            temperature=self.config.sampling.temperature,
            max_tokens=self.config.data.max_response_tokens,
        )
        sampler.generate(requests, done)

    def close(self) -> None:
        if self.engine is not None:
            self.engine.close()
        self.engine = None


class _Drawn:
    """Responses on disk as they come: rows of the file by the request's place, those of whose responses all are there,
    and the seconds that they took.

    Raises UserError where the file holds responses that were made otherwise, or is damaged.
    """

    def __init__(self, path: Path, made_from: dict[str, Any], each: int) -> None:
        self.path, self.rows, self.seconds = path, dict[int, list[Row]](), 0.0
        self._log = MetricsLog(path)
        found = scan(path) if path.exists() else Scan([], [], torn=False)
        if found.rows:
            _check_made_from(path, found.rows[0].get("made_from", {}), made_from)
        for number, row in enumerate(found.rows[1:], 2):
            if not {"place", "text", "finished", "tokens", "seconds"} <= row.keys():
                raise UserError(f"{path}, line {number} is no response: delete the file to draw the responses again")
            self.rows.setdefault(row["place"], []).append(row)
            self.seconds = row["seconds"]
        # Of a prompt that was stopped in between all are drawn again: its seed gives them together.
        self.rows = {place: rows for place, rows in self.rows.items() if len(rows) == each}
        kept = [
            line for number, line in enumerate(found.lines) if not number or found.rows[number]["place"] in self.rows
        ]
        write_whole(path, b"".join(line + b"\n" for line in kept))
        if not found.rows:
            self._log.write({"made_from": made_from})
        self._begin = time.perf_counter() - self.seconds

    def add(self, place: int, responses: Sequence[Response]) -> None:
        self.seconds = time.perf_counter() - self._begin
        self.rows[place] = [
            {
                "place": place,
                "text": response.text,
                "finished": response.finished,
                "tokens": len(response.token_ids),
                "seconds": round(self.seconds, 3),
            }
            for response in responses
        ]
        for row in self.rows[place]:
            self._log.write(row)

    def close(self) -> None:
        self._log.close()


def _check_context(model: PreTrainedModel, path: str, needed: int) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and needed > limit:
        raise UserError(
            f"prompt and response limits need a context of {needed} tokens, the model {path} has {limit}: lower "
            "data.max_prompt_tokens or data.max_response_tokens"
        )


def _kind_of(spec: ModelSpec) -> tuple[str, str]:
    """What models have in common that one engine can sample from."""
    # Whatever dtype the file has, all are loaded in one.
    other = ("_name_or_path", "transformers_version", "dtype")
    shape = {k: v for k, v in spec.config.to_dict().items() if k not in other}
    tokenizer = spec.tokenizer
    return repr(shape), tokenizer.backend_tokenizer.to_str() + tokenizer.chat_template


def _sample(
    sampler: _Sampler, rows: list[RawRow], folder: Path, model: str, made_from: dict[str, Any], log: Log
) -> None:
    groups, report = build_prompts(rows, sampler.template, sampler.run_config.data)
    each = sampler.config.eval.samples
    requests = [
        # The same seed for every model: equal models give equal responses.
        SampleRequest(g.prompt.token_ids, each, derived_seed(sampler.config.run.seed, folder.name, g.prompt.index))
        for g in groups
    ]
    drawn = _Drawn(folder / f"drawn-{model}.part", made_from, each)
    missing = [place for place in range(len(requests)) if place not in drawn.rows]
    if drawn.rows:
        log(f"  {len(drawn.rows)} of them are there already")

    def done(at: int, samples: Sequence[Response]) -> None:
        place = missing[at]
        where = f"the prompt of row {groups[place].prompt.index} (from 0)"
        drawn.add(place, [of_student(sample, sampler.config.data.reasoning, where) for sample in samples])

    if missing:
        sampler.generate([requests[place] for place in missing], done)
    drawn.close()
    rows_of = [drawn.rows[place] for place in range(len(requests))]
    tokens, seconds = sum(row["tokens"] for of in rows_of for row in of), drawn.seconds
    made = [
        ResponseRow(
            prompt=group.prompt.messages[-1]["content"],
            messages=group.prompt.messages,
            reference=group.teacher.text,
            response=row["text"],
            finished=row["finished"],
            source=rows[group.prompt.index].where,
            reference_finished=group.teacher.finished,
            index=group.prompt.index,
            sample=sample,
        )
        for group, of in zip(groups, rows_of, strict=True)
        for sample, row in enumerate(of)
    ]
    record = {"made_from": made_from, "notes": report.sentences(), "tokens": tokens, "seconds": round(seconds, 3)}
    # Before the responses: without it they would be taken for another system's.
    write_json(folder / f"sampled-{model}.json", record)
    write_responses(folder / f"{model}.jsonl", made)
    drawn.path.unlink()
    log(f"  {tokens} tokens in {seconds:.1f} s ({tokens / seconds:.0f}/s)")
    for sentence in report.sentences():
        log(f"  {sentence}")
