"""What eval takes from the runs that it evaluates: limits, since a student trained to 64 tokens is not asked for 1,536,
and the column map, since held-out rows mostly come from the same table.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from gadcore.checkpoint.export import config_path, is_checkpoint
from gadcore.config import loading
from gadcore.config.writing import to_toml
from gadcore.data.forms import has_column, wanted_columns
from gadcore.data.sources import BUILTIN, Source
from gadcore.errors import UserError
from gadcore.evaluate.sampling import Log
from gadcore.evaluate.settings import EvalConfig, LimitSettings, SetSettings


def with_run_limits(config: EvalConfig, log: Log) -> EvalConfig:
    """The settings, in which every limit of `data` that the user has not chosen is that of the runs in eval.models.

    A model that is no run takes the limits of those that are; all are measured alike. Raises UserError where the runs
    differ in a limit, or where a run's settings cannot be read.
    """
    open_limits = [name for name in LimitSettings.model_fields if name not in config.data.model_fields_set]
    runs = _runs(config)
    if not open_limits or not runs:
        return config
    try:
        data = {model: loading.load(["--config", str(path)]).data for model, path in runs.items()}
    except UserError as error:
        named = ", ".join(f"data.{name}" for name in open_limits)
        raise UserError(f"{error}; or choose {named} for eval yourself, which are read from there") from None
    taken = {}
    for name in open_limits:
        values = {model: getattr(settings, name) for model, settings in data.items()}
        first, *others = values.values()
        if any(value != first for value in others):
            each = ", ".join(f"{_shown(value)} in {model}" for model, value in values.items())
            raise UserError(f"the runs differ in data.{name} ({each}): choose one for all by --data.{name}")
        if first != getattr(config.data, name):
            taken[name] = first
    if taken:
        log(f"as in {' and '.join(runs)}: " + ", ".join(f"data.{name} = {_shown(v)}" for name, v in taken.items()))
    # The user's own choices stay marked as such: what has no effect is told of them alone.
    limits = config.data.model_copy(update=taken)
    limits.model_fields_set.difference_update(taken)
    return config.model_copy(update={"data": limits})


def with_run_columns(config: EvalConfig, log: Log) -> EvalConfig:
    """The settings, in which sets without columns of their own have the column map of the runs in eval.models.

    Sets that have no such columns are left as they are, and all of them where the runs differ in the map.
    """
    maps = []
    for path in _runs(config).values():
        # Settings that cannot be read are told by with_run_limits(), as far as they are needed.
        with suppress(UserError):
            maps.append(loading.load(["--config", str(path)]).data.columns)
    if not maps or not maps[0] or any(other != maps[0] for other in maps):
        return config
    taken = []
    chosen: dict[str, dict[str, SetSettings]] = {}
    for domain in ("in_domain", "out_of_domain"):
        chosen[domain] = dict(getattr(config.eval, domain))
        for name, settings in chosen[domain].items():
            if "columns" not in settings.model_fields_set and _has_columns(settings.source, maps[0]):
                chosen[domain][name] = settings.model_copy(update={"columns": maps[0]})
                taken.append(name)
    if not taken:
        return config
    log(f"as in {' and '.join(_runs(config))}: columns = {_shown(maps[0])} of {' and '.join(taken)}")
    return config.model_copy(update={"eval": config.eval.model_copy(update=chosen)})


def _has_columns(source: str, columns: Mapping[str, str]) -> bool:
    """Whether the first row of a source has what a column map names."""
    if source == BUILTIN:
        return False
    # What cannot be read is told by whoever reads all rows.
    with suppress(UserError):
        for _, record in Source.find(source, "eval").records(wanted_columns(columns)):
            if isinstance(record, Mapping):
                return all(has_column(record, column) for column in columns.values())
    return False


def _runs(config: EvalConfig) -> dict[str, Path]:
    """{model: the config.toml of its run}, of those that are one's."""
    return {model: path for model, value in config.eval.models.items() if (path := _config_of(value))}


def _shown(value: object) -> str:
    return "none" if value is None else to_toml(value)


def _config_of(value: str) -> Path | None:
    """The config.toml of the run that a value of eval.models belongs to."""
    folder = Path(value).expanduser()
    if is_checkpoint(folder):
        return config_path(folder)
    places = [folder, *([folder.parent] if folder.name in ("student", "discriminator") else [])]
    return next((place / "config.toml" for place in places if (place / "config.toml").is_file()), None)
