"""Any settings on a command line and in a TOML file: the settings that stand there, or one sentence. Nothing else."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gadcore.config.command_line import setting_kinds
from gadcore.config.kinds import Section
from gadcore.config.loading import dump, load, presets
from gadcore.config.settings import Config
from gadcore.errors import UserError
from gadcore.evaluate.settings import EvalConfig
from gadcore.integrations.service.settings import ServiceConfig
from gadcore.teacher.settings import CollectConfig
from tests.support.damage import odd_bytes, thorough

MODELS: list[type[Section]] = [Config, CollectConfig, EvalConfig, ServiceConfig]
KINDS = {model: setting_kinds(model) for model in MODELS}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
# As somebody may type them; the last ones cannot be written in any shell, but in a file.
TYPED = (
    "", " ", "none", "None", "true", "True", "yes", "0", "1", "-1", "7", "3.5", ".5", "1.", "1e-5", "1e999", "-inf",
    "nan", "0x10", "1_000", "9" * 19, "9" * 4400, "1e29", "auto", "cpu", "cuda:0", "vllm", "hf", "split", "~", "..",
    "~nobody/x", "a=b", "a=b,c=d", "=", "{}", "{a = 1}", "[]", "[0.9, 0.999]", "[1", "[" * 400 + "]" * 400, "'", "é",
    '"x"', "a\nb", "2026-01-01", "--x", "-x", "\udcff", "a\0b", "\x1b[2J", "\u202e",
)  # fmt: skip
WORDS = ("--config", "--preset", "--help-me", "--run", "--run.", "=", "--")
VALUE = st.one_of(st.sampled_from(TYPED), TEXT, st.integers().map(str), st.floats().map(str))


def right_or_told(argv: list[str], model: type[Section]) -> Section | None:
    """The settings; None where one UserError of one line tells what is wrong."""
    try:
        found = load(argv, model)
    except UserError as error:
        # What a user wrote stands in it as it is: whatever prints it cleans it (gadcore.text.say).
        assert str(error) and len(str(error)) < 3000
        return None
    return found


@thorough
@given(data=st.data(), model=st.sampled_from(MODELS))
def test_any_value_of_any_setting(data: st.DataObject, model: type[Section]) -> None:
    key = data.draw(st.sampled_from(sorted(KINDS[model])))
    value = data.draw(VALUE)
    plain = load([], model)
    found = right_or_told([f"--{key}={value}"], model)
    if found is None:
        return
    section, _, name = key.partition(".")
    # Nothing but this setting has changed, or what another engine brings along.
    for other in type(found).model_fields:
        mine, before = getattr(found, other), getattr(plain, other)
        if type(mine) is type(before):
            changed = {n for n in type(mine).model_fields if getattr(mine, n) != getattr(before, n)}
            allowed = {name} if other == section else set()
            # Other rows of one's own bring their own held-out ones.
            allowed |= {"eval"} if key in ("data.train", "data.eval_share") and other == "data" else set()
            # NaN is unequal to itself.
            assert {n for n in changed if getattr(mine, n) == getattr(mine, n)} <= allowed, (key, value, changed)
    assert dump(type(found).model_validate(found.model_dump(), strict=False)) == dump(found)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run.seed", "9" * 4301),
        ("run.seed", "1e29"),
        ("run.seed", str(2**31)),
        ("rollout.group_size", str(2**31)),
        ("data.columns", "[" * 400 + "]" * 400),
        ("data.template_arguments", "{a = " + "[" * 400 + "]" * 400 + "}"),
    ],
)
def test_a_number_or_depth_beyond_all_use_is_told(key: str, value: str, tmp_path: Path) -> None:
    section, _, name = key.partition(".")
    (tmp_path / "mine.toml").write_text(f"[{section}]\n{name} = {value}\n")
    for argv in ([f"--{key}={value}"], ["--config", str(tmp_path / "mine.toml")]):
        with pytest.raises(UserError) as caught:
            load(argv)
        assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)
        assert name in str(caught.value) or "mine.toml" in str(caught.value)


@thorough
@given(
    data=st.data(),
    model=st.sampled_from(MODELS),
    words=st.lists(st.one_of(st.sampled_from(WORDS), TEXT), max_size=3),
)  # fmt: skip
def test_any_command_line(data: st.DataObject, model: type[Section], words: list[str]) -> None:
    keys = data.draw(st.lists(st.sampled_from(sorted(KINDS[model])), max_size=3))
    argv = [*words, *(word for key in keys for word in (f"--{key}", data.draw(VALUE)))]
    if not {"-h", "--help"} & {*argv}:
        right_or_told(data.draw(st.permutations(argv)), model)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[type[Section], Path]:
    folder = tmp_path_factory.mktemp("settings")
    found = {}
    for model in MODELS:
        found[model] = folder / f"{model.__name__}.toml"
        found[model].write_text(dump(load([], model)))
    return found


# Kept in what is written; read back as the very settings that it says.
PIECES = (
    "\n", "=", "[", "]", "[run]\n", "[[run]]\n", "[student.model]\n", "run = 1\n", 'base = "paper"\n', "base = 3\n",
    'base = "nothing"\n', '"" = 1\n', "x" * 300, '"""', "# \u0001\n", "seed = 1\n", "seed = 0x" + "f" * 4000 + "\n",
    "[data]\ncolumns = {prompt = 1}\n", "[data.columns]\nprompt = 'a'\n", "\ufeff", "a.b.c.d = 1\n", "\r\n",
    "1979-05-27\n",
)  # fmt: skip


@thorough
@given(data=st.data(), model=st.sampled_from(MODELS))
def test_any_damage_to_a_file_of_settings(
    data: st.DataObject, model: type[Section], files: dict[type[Section], Path], tmp_path: Path
) -> None:
    whole = files[model].read_bytes()
    content = data.draw(
        st.one_of(
            odd_bytes(whole),
            st.lists(st.sampled_from(PIECES), max_size=6).map(lambda pieces: "".join(pieces).encode()),
            st.tuples(st.integers(0, len(whole)), st.sampled_from(PIECES)).map(
                lambda at: whole[: at[0]] + at[1].encode() + whole[at[0] :]
            ),
        )
    )
    path = tmp_path / "settings.toml"
    path.write_bytes(content)
    found = right_or_told(["--config", str(path)], model)
    if found is None:
        return
    said: dict[str, Any] = tomllib.loads(content.decode())
    for section, table in said.items():
        for name, value in (table if isinstance(table, dict) else {}).items():
            mine = getattr(getattr(found, section), name)
            if isinstance(value, bool | int | float) and value == value:
                assert mine == value, (section, name)
    assert said.get("base", presets()[0]) in presets()
