"""Settings: precedence, typed values from the command line, one-sentence errors, dump and load."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from gadcore.config.loading import dump, load, presets
from gadcore.config.rollout import OwnRollout
from gadcore.config.settings import Config, HFRollout
from gadcore.errors import UserError
from gadcore.evaluate.settings import EvalConfig

PAPER_STUDENTS = {
    "qwen2.5-3b": "Qwen/Qwen2.5-3B-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    "qwen2.5-14b": "Qwen/Qwen2.5-14B-Instruct",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
}

# SHA-256 of the resolved settings, as sorted JSON.
# Settings that came later, with the values that leave a run as it was before them.
LATER = {
    "data.eval_share": 0.1,
    "data.bad_rows": "error",
    "data.eval_columns": "none",
    "data.eval_samples": 1,
    "data.reasoning": "keep",
    "curriculum.every": 0,
    "curriculum.rows": 64,
    "curriculum.end_sft": False,
    "curriculum.end_warmup": False,
    "curriculum.patience": 2,
    "curriculum.tolerance": 0.01,
    "schedule.sft_epochs": 0,
    "schedule.sft_steps": "none",
    "data.template_arguments": {},
    "student.master": "device",
    "discriminator.master": "device",
    "algorithm.importance_cap": "none",
    "discriminator.score_l2": 0.0,
    "algorithm.score_clip": "none",
    "algorithm.length_debias": 0.0,
    "student.soda_lr": 5e-7,
    "algorithm.soda_beta": 0.1,
    "algorithm.soda_samples": 1,
    "schedule.soda_epochs": 1,
    "schedule.soda_steps": "none",
    "rollout.head_dtype": "float32",
    "rollout.batch_invariant": False,
    "rollout.tensor_parallel": 1,
    "rollout.probe_every": 10,
    "rollout.parts": 1,
    "rollout.ahead": 0,
    "rollout.ahead_by_turns": False,
    "checkpoint.asynchronous": False,
    "distributed.shard": 0,
    "distributed.replicate": 1,
    "distributed.timeout_s": 1800.0,
    **{f"{name}.adapter": "none" for name in ("student", "discriminator")},
    **{f"{name}.adapter_base": "none" for name in ("student", "discriminator")},
    **{
        f"{name}.adapter_{key}": "none"
        for name in ("student", "discriminator")
        for key in ("rank", "alpha", "targets", "rslora", "from")
    },
}
# Presets of the default job, which is not the paper's, with what they have of the settings that came later.
DEFAULT_JOB = {
    "smollm2-cpu": {
        "data.eval_samples": 4,
        "algorithm.length_debias": "fit",
        "schedule.sft_epochs": 2,
        "schedule.sft_steps": 80,
        "student.adapter": "lora",
    },
    "smollm2-gpu": {"data.eval_samples": 8, "schedule.sft_epochs": 8},
}
# What the device decides now, with what it was before, and still is on a CPU.
LEFT_OPEN = {"rollout.max_num_seqs": 256, "rollout.enforce_eager": True}
RESOLVED = {
    "llama-3.1-8b": "a97b408b0458dbae43900a8616df2f6163456754e30ebf4241a303bbe7de32e8",
    "llama-3.1-8b-lora": "84f581469605a7cf2f0a09cb573c732e431f25bc676439fb87ed3aa68a2df082",
    "llama-3.2-3b": "6638b814ba82adba8b79eb4cca116da336cee7f77f8c2057b153145db0b313ab",
    "qwen2.5-14b": "461e94cd430f89d0962e537f2d40464612902aad4f7735f850f6fb6caaba226b",
    "qwen2.5-14b-lora": "376d8416846baf1bd584aa311d750137c1c9be7d822533373dd67a85676df94a",
    "qwen2.5-3b": "168c1f4521ad04acabd6e867d75a64ad313abc2b162db9f3c6f09fa56855bb35",
    "qwen2.5-3b-lora": "27edfcb520232983e44d36bc82f03df5bf3cb769686397181c4eba89b6a8eca0",
    "qwen2.5-7b": "f038f3e590b54cf29c09846adfcf28565b9db4c4dd0c252d00b37f55def658a1",
    "qwen2.5-7b-lora": "e219436e9cee310293d7ce054381c8faeaedd804f13944036c70ef2933019337",
    "qwen2.5-3b-qlora": "7a37410c69781448ba39717352ad56363ab7539c028826f33552ba516c4324af",
    "qwen2.5-7b-qlora": "452ffd5e9ce732028d26d0626c3bb8edde4b36d96b3b4edaa17f07844229a210",
    "smollm2-cpu": "96701579957c11ce1ae46b65d29e876260894195211022fb7b684c8fb8aafbb8",
    "smollm2-gpu": "d242478888a9b636a43a7616ce152686951ef3d5b06cbdd57376a269e95731e7",
}


@pytest.fixture
def toml(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "run.toml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def error_of(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        load(argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_nothing_given_means_the_cpu_preset() -> None:
    assert load([]) == load(["--preset", "smollm2-cpu"])
    assert load([]).student.model == "smollm2-135m-instruct"


def test_the_command_line_beats_the_file_and_the_file_beats_the_defaults(toml) -> None:
    path = toml("[schedule]\nbatch_size = 7\ngad_epochs = 3\n")
    config = load(["--config", path, "--schedule.batch_size", "9"])
    assert (config.schedule.batch_size, config.schedule.gad_epochs) == (9, 3)
    assert config.schedule.warmup_epochs == Config().schedule.warmup_epochs
    assert config.data == Config().data  # a file does not build on the default preset


def test_of_two_values_on_the_command_line_the_later_counts() -> None:
    assert load(["--run.seed", "1", "--run.seed=2"]).run.seed == 2


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("schedule.batch_size", "8", 8),
        ("schedule.batch-size", "8", 8),
        ("run.seed", "1_000", 1000),
        ("student.lr", "1e-5", 1e-5),
        ("student.lr", ".5", 0.5),
        ("student.lr", "1", 1.0),
        ("algorithm.length_debias", "0", 0.0),
        ("algorithm.length_debias", ".5", 0.5),
        ("algorithm.length_debias", "fit", "fit"),
        ("rollout.prefix_caching", "false", False),
        ("rollout.prefix_caching", "True", True),
        ("run.name", "5", "5"),
        ("run.name", "--x", "--x"),
        ("data.train", "a b.jsonl", "a b.jsonl"),
        ("data.train_rows", "12", 12),
        ("data.train_rows", "none", None),
        ("data.eval", "None", None),
        ("data.columns", '{prompt = "question"}', {"prompt": "question"}),
        ("student.betas", "[0.8, 0.95]", (0.8, 0.95)),
        ("tracking.tracker", "none", "none"),
        ("student.autocast", "none", "none"),
    ],
)
def test_values_on_the_command_line_take_the_type_of_their_setting(key: str, text: str, value: object) -> None:
    section, name = key.replace("-", "_").split(".")
    found = getattr(getattr(load([f"--{key}={text}"]), section), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("argv", "table", "text"),
    [
        (["--data.trian", "x"], 'data.trian = "x"', "unknown setting data.trian ({}); did you mean data.train?"),
        (["--batch_size", "3"], "batch_size = 3", "unknown setting batch_size ({}); did you mean schedule.batch_size?"),
        (
            ["--shedule.batch_size", "3"],
            "shedule.batch_size = 3",
            "unknown setting shedule.batch_size ({}); did you mean schedule.batch_size?",
        ),
        (["--xqz", "3"], "xqz = 3", "unknown setting xqz ({})"),
        (
            ["--schedule.batch_size", "0"],
            "schedule.batch_size = 0",
            "schedule.batch_size = 0 ({}) must be greater than 0",
        ),
        (
            ["--schedule.batch_size", "x"],
            'schedule.batch_size = "x"',
            'schedule.batch_size = "x" ({}) must be a whole number',
        ),
        (
            ["--schedule.batch_size", "8.0"],
            "schedule.batch_size = 8.0",
            "schedule.batch_size = 8.0 ({}) must be a whole number",
        ),
        (
            ["--schedule.batch_size", "true"],
            "schedule.batch_size = true",
            "schedule.batch_size = true ({}) must be a whole number",
        ),
        (["--student.lr", "fast"], 'student.lr = "fast"', 'student.lr = "fast" ({}) must be a number'),
        (["--student.lr", "nan"], "student.lr = nan", "student.lr = nan ({}) must be a finite number"),
        (
            ["--rollout.prefix_caching", "0"],
            "rollout.prefix_caching = 0",
            "rollout.prefix_caching = 0 ({}) must be true or false",
        ),
        (
            ["--rollout.engine", "vlm"],
            'rollout.engine = "vlm"',
            "rollout.engine = \"vlm\" ({}) must be 'vllm' or 'vllm-server' or 'hf' or module:class",
        ),
        (
            ["--student.betas", "0.9"],
            "student.betas = 0.9",
            "student.betas = 0.9 ({}) must be a list, for example [0.9, 0.999]",
        ),
        (["--student.betas", "[0.9]"], "student.betas = [0.9]", "student.betas = [0.9] ({}) has too few items"),
        (
            ["--student.betas", "[0.9, 0.9, 0.9]"],
            "student.betas = [0.9, 0.9, 0.9]",
            "student.betas = [0.9, 0.9, 0.9] ({}) has too many items",
        ),
        (
            ["--student.betas", "[0.9, true]"],
            "student.betas = [0.9, true]",
            "student.betas = [0.9, true] ({}): item [1] must be a number",
        ),
        (
            ["--data.columns", "question"],
            'data.columns = "question"',
            'data.columns = "question" ({}) must be a table, for example {{prompt = "question"}}',
        ),
        (
            ["--data.columns", "{prompt = 3}"],
            "data.columns = {prompt = 3}",
            'data.columns = {{"prompt" = 3}} ({}): item ["prompt"] must be text',
        ),
        (
            ["--rollout.group_size", "1"],
            "rollout.group_size = 1",
            "rollout.group_size = 1 leaves no group to compare with: every advantage would be 0 (0 / 0 when "
            "algorithm.normalise_advantage is set): use 2 or more samples per prompt (rollout.group_size: {})",
        ),
    ],
)
def test_an_error_reads_the_same_from_the_command_line_and_from_a_file(
    toml, argv: list[str], table: str, text: str
) -> None:
    assert error_of(*argv) == text.format("command line")
    path = toml(table)
    assert error_of("--config", path) == text.format(path)


def test_text_in_quotes_is_no_number_in_a_file(toml) -> None:
    path = toml('[schedule]\nbatch_size = "8"')
    assert error_of("--config", path) == f'schedule.batch_size = "8" ({path}) must be a whole number'


def test_a_date_is_no_text(toml) -> None:
    path = toml("[run]\nname = 2024-01-01")
    assert error_of("--config", path) == f"run.name = 2024-01-01 ({path}) must be text"


def test_an_impossible_combination_says_where_each_value_came_from(toml) -> None:
    path = toml("[data]\nmax_response_tokens = 1000\ntrain_rows = 5\ntrain = 'builtin'")
    message = error_of("--config", path, "--data.max_prompt_tokens", "2000", "--rollout.context_tokens=2500")
    assert "data.max_prompt_tokens = 2000 and data.max_response_tokens = 1000 do not fit" in message
    assert message.endswith(
        f"(data.max_response_tokens: {path}, data.max_prompt_tokens: command line, "
        "rollout.context_tokens: command line)"
    )


def test_the_command_line_may_mend_a_combination_of_the_file(toml) -> None:
    path = toml("[rollout]\ngroup_size = 1")
    assert load(["--config", path, "--rollout.group_size", "2"]).rollout.group_size == 2


def test_a_group_of_settings_is_no_setting(toml) -> None:
    assert error_of("--data", "x") == "data (command line) is a group of settings: write --data.NAME VALUE"
    path = toml("data = 3")
    assert error_of("--config", path) == f"data ({path}) is a group of settings: write it as a table [data]"


def test_an_unknown_empty_table_is_refused(toml) -> None:
    path = toml("[shedule]\n")
    assert error_of("--config", path).startswith(f"unknown setting shedule ({path})")


def test_broken_toml_names_file_and_line(toml) -> None:
    path = toml("[data]\ntrain = \n")
    assert error_of("--config", path) == f"{path} is not valid TOML: Invalid value (at line 2, column 9)"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert error_of("--config", "absent.toml") == "the config file absent.toml does not exist"
    assert error_of("--config", "qwen2.5-3b").endswith("does not exist; for the preset of this name write "
                                                        "--preset qwen2.5-3b")  # fmt: skip
    assert error_of("--config", str(tmp_path)) == f"the config file {tmp_path} cannot be read: Is a directory"
    latin = tmp_path / "latin.toml"
    latin.write_bytes(b'[run]\nname = "caf\xe9"\n')
    assert error_of("--config", str(latin)) == f"{latin} is not UTF-8 (byte 17): save it as UTF-8"


def test_presets_by_a_wrong_name() -> None:
    assert error_of("--preset", "qwen-3b") == "there is no preset qwen-3b; did you mean qwen2.5-3b?"
    assert error_of("--preset", "zzz") == f"there is no preset zzz: choose one of {', '.join(presets())}"


def test_file_and_preset_exclude_each_other() -> None:
    assert error_of("--config", "a", "--preset", "b") == (
        "--config a and --preset b are given together: start from one file or one preset"
    )


def test_a_command_line_that_is_none() -> None:
    assert error_of("train.jsonl") == ("unexpected argument 'train.jsonl': settings are written --section.key VALUE")
    assert error_of("--data.train") == "--data.train needs a value: --data.train VALUE"
    assert error_of("--data.train", "--run.seed", "3") == "--data.train needs a value: --data.train VALUE"
    assert error_of("--data.train", "--help") == "--data.train needs a value: --data.train VALUE"
    assert error_of("--run.name", "\udcff") == "the value of --run.name is not UTF-8: b'\\xff'"


@pytest.mark.parametrize("name", presets())
def test_a_dump_of_every_preset_loads_to_the_same_settings(name: str, toml) -> None:
    config = load(["--preset", name])
    assert load(["--config", toml(dump(config))]) == config


def test_a_dump_keeps_unset_settings_unset_and_any_text(toml) -> None:
    config = load(
        ["--data.eval", "none", "--run.name", 'a"\\\x7f\x01é\n', "--data.columns", '{prompt = "a b", content = ""}']
    )
    assert config.data.eval is None
    assert load(["--config", toml(dump(config))]) == config


def test_a_dump_names_every_setting() -> None:
    config = load([])
    text = dump(config)
    for section in Config.model_fields:
        assert f"[{section}]" in text
        for name in type(getattr(config, section)).model_fields:
            assert f"\n{name} = " in text


@pytest.mark.parametrize(("name", "digest"), RESOLVED.items())
def test_a_preset_resolves_to_the_same_settings_ever(name: str, digest: str) -> None:
    settings = tomllib.loads(dump(load(["--preset", name])))
    of_adapters = {"adapter": "lora", "adapter_rank": 64} if name.endswith("-lora") else {}
    if name.endswith("-qlora"):
        of_adapters = {"adapter": "lora", "adapter_rank": 16, "adapter_base": "nf4"}
    chosen = {f"{section}.{key}": v for section in ("student", "discriminator") for key, v in of_adapters.items()}
    for key, value in (LATER | chosen | DEFAULT_JOB.get(name, {})).items():
        section, _, setting = key.partition(".")
        assert settings[section].pop(setting) == value
    for key, value in LEFT_OPEN.items():
        section, _, setting = key.partition(".")
        assert settings[section][setting] == "none"
        settings[section][setting] = value
    # A section of nothing but later settings.
    settings = {section: kept for section, kept in settings.items() if kept}
    assert hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest() == digest


NINES = "9" * 4400


@pytest.mark.parametrize(
    "argv", [[NINES], ["--config", NINES], ["--preset", NINES], ["--" + NINES, "1"], ["--run." + NINES, "1"]]
)
def test_a_name_of_thousands_of_characters_is_told_in_one_sentence(argv: list[str]) -> None:
    with pytest.raises(UserError, match=r"9\.\. \(4,40\d characters\)") as caught:
        load(argv)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("cap", ["0.5", "-1", "nan", "inf"])
def test_a_cap_that_would_only_scale_the_loss_is_refused(cap: str) -> None:
    with pytest.raises(UserError, match="algorithm.importance_cap"):
        load(["--algorithm.importance_cap", cap])
    assert load(["--algorithm.importance_cap", "2"]).algorithm.importance_cap == 2
    assert load(["--algorithm.importance_cap", "none"]).algorithm.importance_cap is None


def test_every_preset_is_watched() -> None:
    assert set(presets()) == {*RESOLVED, "paper", "soda"}


def test_the_soda_preset_is_the_paper_and_the_defaults_of_soda() -> None:
    assert load(["--preset", "soda"]) == load(["--preset", "paper", "--run.name", "soda"])


def test_a_paper_preset_is_the_paper_and_a_model() -> None:
    ours = load(["--preset", "paper", "--run.name", "qwen2.5-7b", "--student.model", PAPER_STUDENTS["qwen2.5-7b"]])
    assert ours == load(["--preset", "qwen2.5-7b"])


def test_a_file_may_change_a_preset(toml) -> None:
    path = toml('base = "qwen2.5-3b"\n[schedule]\nbatch_size = 7\n')
    config, base = load(["--config", path, "--run.seed=3"]), load(["--preset", "qwen2.5-3b"])
    assert (config.schedule.batch_size, config.run.seed) == (7, 3)
    assert config.student == base.student and config.rollout == base.rollout and config.run.name == "qwen2.5-3b"


@pytest.mark.parametrize(
    ("base", "sentence"),
    [
        ('"qwen-3b"', "there is no preset qwen-3b; did you mean qwen2.5-3b?"),
        ("3", "base = 3 ({}) must be the name of a preset"),
    ],
)
def test_a_base_that_is_no_preset(base: str, sentence: str, toml) -> None:
    path = toml(f"base = {base}")
    assert error_of("--config", path) == sentence.format(path)


def test_a_value_of_the_base_is_named_by_its_preset(toml) -> None:
    path = toml('base = "smollm2-cpu"\n[rollout]\ncontext_tokens = 100')
    assert error_of("--config", path).endswith(
        f"(data.max_prompt_tokens: preset smollm2-cpu, data.max_response_tokens: preset smollm2-cpu, "
        f"rollout.context_tokens: {path})"
    )


HF, VLLM = 'rollout.engine = "hf"', 'rollout.engine = "vllm"'


def test_an_engine_refuses_settings_of_another(toml) -> None:
    text = f'rollout.{{}} of {VLLM}; this run has "hf" ({{}}): leave {{}} out'
    line = ("--rollout.engine", "hf", "--rollout.block_size", "16")
    assert error_of(*line) == text.format("block_size is a setting", "command line", "it")
    path = toml(f"{HF}\nrollout.block_size = 16\nrollout.dtype = 'bfloat16'")
    assert error_of("--config", path) == text.format("block_size, rollout.dtype are settings", path, "them")
    path = toml(HF)
    assert error_of("--config", path, "--rollout.block_size=16") == text.format(
        "block_size is a setting", "command line", "it"
    )


PRESET = load(["--preset", "smollm2-cpu"])


def test_another_engine_leaves_the_former_ones_settings_behind(toml) -> None:
    assert load(["--rollout.engine", "hf"]).rollout == HFRollout(group_size=PRESET.rollout.group_size)
    path = toml(f"{VLLM}\nrollout.block_size = 16\nrollout.group_size = 3")
    assert load(["--config", path, "--rollout.engine=hf"]).rollout == HFRollout(group_size=3)
    path = toml(f'base = "smollm2-cpu"\n{HF}')
    config = load(["--config", path])
    assert config.rollout == HFRollout(group_size=PRESET.rollout.group_size)
    assert load(["--config", toml(dump(config))]) == config
    assert load(["--config", path, "--rollout.engine=vllm", "--rollout.block_size=16"]).vllm.block_size == 16


def test_an_engine_that_is_none(toml) -> None:
    path = toml("rollout.engine = [1]")
    assert (
        error_of("--config", path)
        == f"rollout.engine = [1] ({path}) must be 'vllm' or 'vllm-server' or 'hf' or module:class"
    )


def test_settings_of_vllm_are_vllms_alone() -> None:
    assert Config().vllm == Config().rollout
    with pytest.raises(TypeError, match="hf"):
        _ = Config(rollout=HFRollout()).vllm


def test_only_what_the_user_wrote_counts_as_set(toml) -> None:
    config = load(["--config", toml('base = "paper"\n[student]\nlr = 1e-6'), "--run.seed=0"])
    assert (config.student.model_fields_set, config.run.model_fields_set) == ({"lr"}, {"seed"})
    assert load(["--preset", "paper"]).student.model_fields_set == set()
    assert load([], saved=Path(toml("[student]\nlr = 1e-3"))).student.model_fields_set == set()


def test_a_saved_config_gives_way_to_a_file_or_preset(toml) -> None:
    saved = Path(toml("[student]\nlr = 1e-3"))
    assert load(["--run.seed=3"], saved=saved).student.lr == 1e-3
    assert load(["--preset", "paper"], saved=saved).student.lr == 1e-6


@pytest.mark.parametrize("name", ["my_losses:reinforce", "my.losses_2:f"])
def test_functions_are_named_by_module_and_function(name: str) -> None:
    assert load(["--algorithm.loss", name]).algorithm.loss == name


@pytest.mark.parametrize("value", ["foo", "FIT", "none", "true", "nan", "inf"])
def test_a_setting_that_takes_a_number_or_a_word_says_both(value: str) -> None:
    message = error_of(f"--algorithm.length_debias={value}")
    assert message.startswith("algorithm.length_debias = ") and 'must be a number or "fit" (' in message


def test_an_engine_of_ones_own_is_named_by_module_and_class(toml) -> None:
    config = load(["--rollout.engine", "my.engines:Greedy", "--rollout.temperature=2"])
    assert config.rollout == OwnRollout(engine="my.engines:Greedy", group_size=PRESET.rollout.group_size, temperature=2)
    assert load(["--config", toml(dump(config))]) == config
    assert error_of("--rollout.engine=my/engines:Greedy").startswith(
        "rollout.engine = 'my/engines:Greedy' is not of the form module:class: write the name by which"
    )
    message = error_of("--rollout.engine=my.engines:Greedy", "--rollout.block_size=16")
    assert message.startswith(
        'rollout.block_size is a setting of rollout.engine = "vllm"; this run has "my.engines:Gre'
    )


@pytest.mark.parametrize("key", ["loss", "reward"])
@pytest.mark.parametrize("name", ["reinforce", "my_losses.reinforce", "my_losses.py:f", ":f", "m:", "a:b:c", "a/b:c"])
def test_a_function_of_another_form(key: str, name: str) -> None:
    message = error_of(f"--algorithm.{key}={name}")
    assert message.startswith(f"algorithm.{key} = '{name}' is not of the form module:function: write the name")
    assert message.endswith(f"(algorithm.{key}: command line)")


@pytest.mark.parametrize("name", PAPER_STUDENTS)
def test_presets_of_the_paper(name: str) -> None:
    config = load(["--preset", name])
    assert config.student.model == PAPER_STUDENTS[name]
    assert (config.schedule.batch_size, config.rollout.group_size, config.rollout.temperature) == (256, 8, 0.8)
    assert (config.data.max_prompt_tokens, config.data.max_response_tokens) == (2048, 1536)
    assert (config.student.lr, config.student.seqkd_lr, config.discriminator.lr) == (1e-6, 5e-6, 1e-6)
    for model in (config.student, config.discriminator):
        assert (model.betas, model.weight_decay, model.grad_clip) == ((0.9, 0.999), 0.01, 0.2)
    algorithm = config.algorithm
    assert (algorithm.clip_low, algorithm.clip_high, algorithm.kl_coef) == (0.2, 0.2, 0.001)
    assert algorithm.sft_temperature == 1.0
    assert (config.schedule.warmup_epochs, config.schedule.gad_epochs) == (1, 2)
    assert config.discriminator.model == "student"
    assert config.data.train == "ytz20/LMSYS-Chat-GPT-5-Chat-Response"


def test_a_long_value_makes_no_long_sentence() -> None:
    sentence = error_of("--data.template_arguments", "9" * 5000)
    assert sentence.startswith("data.template_arguments must be a table") and len(sentence) < 1200
    assert sentence.endswith("(data.template_arguments: command line)")


def test_a_number_that_python_does_not_write_is_told(toml) -> None:
    number = "0x" + "f" * 4000
    for written in (f"[data]\neval_rows = {number}", f"[data.columns]\nprompt = {number}"):
        sentence = error_of("--config", toml(written))
        assert sentence.startswith("data.") and "0xfff" in sentence and len(sentence) < 1200
    arguments = load(["--config", toml(f"[data.template_arguments]\nx = {number}")])
    assert load(["--config", toml(dump(arguments))]).data.template_arguments == {"x": int(number, 16)}


def test_help_shows_the_values_in_force_and_ends_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load(["--schedule.batch_size", "77", "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "--schedule.batch_size" in out
    assert "(default: 77)" in out
    assert "--preset" in out
    # One of several engines, though the settings in force are those of one.
    assert "--rollout.engine NAME" in out and "(default: vllm)" in out


def test_the_home_folder_is_that_and_no_folder_of_its_name(monkeypatch: pytest.MonkeyPatch, toml) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = load(["--data.train=~/rows.jsonl", "--run.dir", "~", "--student.model", "owner/na~me", "--memory.dir=~/x"])
    assert (config.data.train, config.run.dir) == ("/home/me/rows.jsonl", "/home/me")
    assert (config.student.model, config.memory.dir) == ("owner/na~me", "/home/me/x")
    chosen = load(["--eval.models=a=~/a,b=b", "--eval.in_domain=s=~/s", "--eval.out=~/out"], EvalConfig).eval
    assert (chosen.models, chosen.in_domain["s"].source) == ({"a": "/home/me/a", "b": "b"}, "/home/me/s")
    assert chosen.out == "/home/me/out"
    with pytest.raises(UserError, match=r"'~nobody.s/x' begins with the home folder .*\(data.train: command line\)"):
        load(["--data.train", "~nobody.s/x"])


def test_a_saved_config_means_the_same_files_from_every_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("rows.jsonl", "model", "builtin", "split", "student", "smollm2-135m-instruct"):
        (tmp_path / name).mkdir()
    given = [
        "--data.train",
        "rows.jsonl",
        "--student.model",
        "model",
        "--discriminator.model=./model",
        "--memory.dir=x",
    ]
    kept = load(given).started_new()
    assert (kept.data.train, kept.data.eval) == (f"{tmp_path}/rows.jsonl", "split")
    assert (kept.student.model, kept.discriminator.model) == (f"{tmp_path}/model", f"{tmp_path}/model")
    assert kept.memory.dir == f"{tmp_path}/x"
    # Names that mean something else, whatever lies there.
    kept = load(["--data.train=owner/rows", "--data.eval=none"]).started_new()
    assert (kept.data.train, kept.data.eval) == ("owner/rows", None)
    assert (kept.student.model, kept.discriminator.model) == ("smollm2-135m-instruct", "student")


@pytest.mark.parametrize("name", ["../../x", "a/b", "/tmp/x", "", ".", "..", "x" * 300, "ä" * 150])
def test_the_name_of_a_run_is_no_path(name: str) -> None:
    with pytest.raises(UserError, match=r"run.name = .* cannot name a folder of runs/.*run.dir"):
        load(["--run.name", name])


@pytest.mark.parametrize("resume", ["yes", "step-", "step-3.replaced", "3", "step-x", "/step-3", "abandoned-step-3"])
def test_what_to_resume_is_auto_or_a_checkpoint(resume: str) -> None:
    with pytest.raises(UserError, match="must be auto or a checkpoint of the run, like step-000003"):
        load(["--run.resume", resume])
    assert load(["--run.resume", "step-000003"]).run.resume == "step-000003"


def test_loading_settings_imports_no_torch() -> None:
    code = "import sys; from gadcore.config.loading import load; load([]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["algorithm.discriminator_steps=2", "algorithm.discriminator_every=2"], "leave one of them at 1"),
        (["algorithm.critic_warmup=2", "algorithm.student_warmup=false"], "never does: set one of them back"),
        (
            ["algorithm.critic_warmup=2", "algorithm.discriminator_warmup=false", "algorithm.student_warmup=true"],
            "would update nothing",
        ),
        (["gate.enabled=true", "algorithm.discriminator_warmup=false"], "keeps from learning"),
        (["gate.enabled=true", "data.eval=none"], "gate.enabled needs held-out prompts"),
        (["convergence.enabled=true", "data.eval=none"], "convergence.enabled needs held-out prompts"),
        (["curriculum.every=2", "data.eval=none"], "curriculum.every = 2 needs held-out prompts"),
        (["curriculum.end_sft=true"], "curriculum.end_sft read what a look"),
        (
            ["curriculum.every=2", "curriculum.end_warmup=true", "algorithm.discriminator_warmup=false"],
            "set one of them",
        ),
        (["gate.low=0.9", "gate.high=0.9"], "leave no accuracy between them"),
        (["discriminator.label_smoothing=0.5"], "discriminator.label_smoothing = 0.5"),
        (["discriminator.margin_cap=0"], "discriminator.margin_cap = 0"),
        (["algorithm.discriminator_steps=0"], "algorithm.discriminator_steps = 0"),
        (["algorithm.discriminator_every=0"], "algorithm.discriminator_every = 0"),
        (["algorithm.advantage_std_floor=0"], "algorithm.advantage_std_floor = 0"),
        (["gate.high=1.5"], "gate.high = 1.5"),
        (["convergence.rows=3"], "convergence.rows = 3"),
    ],
)
def test_ablations_that_cannot_work_are_refused(settings: list[str], message: str) -> None:
    assert message in error_of(*(f"--{setting}" for setting in settings))


def test_the_papers_settings_stay_the_defaults() -> None:
    """No ablation, no remedy, no gate and no early stop in any preset, and the same updates as in Algorithm 1."""
    for name in presets():
        config = load(["--preset", name])
        algorithm, judge = config.algorithm, config.discriminator
        # The default job's student has its cross-entropy before the warmup.
        assert algorithm.student_warmup or (name in DEFAULT_JOB and config.schedule.has_sft)
        assert algorithm.discriminator_warmup and not algorithm.freeze_discriminator
        assert (algorithm.discriminator_steps, algorithm.discriminator_every) == (1, 1)
        assert algorithm.advantage_std_floor == 1e-6
        assert (judge.label_smoothing, judge.margin_cap) == (0, None)
        assert not config.gate.enabled and not config.convergence.enabled and not config.curriculum.every


@pytest.mark.parametrize(
    ("argv", "held_out"),
    [
        ([], "builtin"),
        (["--data.train", "builtin"], "builtin"),
        (["--data.train", "mine.jsonl"], "split"),
        (["--preset", "qwen2.5-7b", "--data.train", "mine.jsonl"], "split"),
        (["--preset", "qwen2.5-7b"], "ytz20/LMSYS-Chat-GPT-5-Chat-Response"),
        (["--data.eval_share", "0.2"], "split"),
        (["--data.train", "mine.jsonl", "--data.eval", "builtin"], "builtin"),
        (["--data.train", "mine.jsonl", "--data.eval", "none"], None),
        (["--data.eval", "other.jsonl", "--data.train", "mine.jsonl"], "other.jsonl"),
    ],
)
def test_nobody_is_judged_by_rows_that_he_did_not_name(argv: list[str], held_out: str | None, toml) -> None:
    config = load(argv)
    assert config.data.eval == held_out
    assert load(["--config", toml(dump(config))]) == config


def test_rows_of_a_file_are_judged_by_those_of_the_file(toml) -> None:
    mine = toml('base = "smollm2-cpu"\n[data]\ntrain = "mine.jsonl"\n')
    assert load(["--config", mine]).data.eval == "split"
    both = toml('base = "smollm2-cpu"\n[data]\ntrain = "mine.jsonl"\neval = "held_out.jsonl"\n')
    assert load(["--config", both, "--data.train", "other.jsonl"]).data.eval == "held_out.jsonl"


def test_a_column_map_is_written_as_one_writes_it() -> None:
    as_table = load(["--data.columns", '{prompt = "a+b", completion = "d"}'])
    assert load(["--data.columns", "prompt=a+b,completion=d"]) == as_table
    assert load(["--data.columns=prompt=a+b", "--data.columns", "completion=d"]) == as_table
    with pytest.raises(UserError, match="must be a table"):
        load(["--data.columns", "prompt=a,prompt=b"])
