"""Any damage to the folder of a model: a student and a discriminator that compute, or one sentence. Nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gadcore import Discriminator, Student
from gadcore.errors import UserError
from tests.support.damage import CI_EXAMPLES, EXAMPLES, odd_bytes, odd_json, thorough
from tests.support.tiny import save_tiny

# Loading takes a tenth of a second and more.
some = settings(thorough, max_examples=EXAMPLES if EXAMPLES != CI_EXAMPLES else 12)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "model")


FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")


@some
@given(data=st.data(), name=st.sampled_from(FILES))
def test_any_damage_to_a_file_of_a_model(data: st.DataObject, name: str, model: Path) -> None:
    copy = model.parent / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(model, copy)
    path = copy / name
    whole = path.read_bytes()
    kind = data.draw(st.sampled_from(["odd", "bytes", "gone", "folder"]))
    if kind == "odd" and name.endswith(".json"):
        parsed = json.loads(whole)
        # Of a tokenizer its settings: its vocabulary has a thousand places that are all alike.
        if name == "tokenizer.json":
            small = {key: value for key, value in parsed.items() if key != "model"}
            text = data.draw(odd_json(small)).rstrip()
            rest = json.dumps(parsed["model"])
            text = f'{text[:-1]}, "model": {rest}}}' if text.endswith("}") else text
        else:
            text = data.draw(odd_json(parsed))
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
    elif kind == "gone":
        path.unlink()
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(data.draw(odd_bytes(whole)))
    for role in (Student, Discriminator):
        try:
            loaded = role.load(str(copy), device="cpu")
            group = loaded.group("Where?", "In Paris.", ["Here", "at zero"])
            if role is Discriminator:
                loaded.score([group])
            else:
                loaded.sample_logprobs([group])
        except UserError as error:
            assert str(error).strip() and len(str(error)) < 3000
            assert "\n" not in str(error)
