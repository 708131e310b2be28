from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gadcore.checkpoint import store
from gadcore.checkpoint.state import RngState, restore_rng, rng_state
from gadcore.errors import UserError
from gadcore.models.state import optimizer_tensors, restore_optimizer
from tests.support.device_bytes import DeviceBytes


def _save(root: Path, step: int, keep: int = 2, value: float = 1.0) -> Path:
    return store.save(root, step, {"student": {"w": torch.full((5,), value)}}, {"step": step}, keep)


def _steps(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_round_trip_keeps_every_bit_and_dtype(tmp_path: Path) -> None:
    tensors = {
        "student": {
            "f32": torch.randn(3, 7),
            "bf16": torch.randn(11).bfloat16(),
            "f64": torch.randn(2, dtype=torch.float64),
            "scalar": torch.tensor(4.0),
            "ints": torch.arange(5),
            "bytes": torch.arange(256, dtype=torch.uint8),
            "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
            "empty": torch.empty(0, 3),
        },
        "discriminator": {},
    }
    state = {"epoch": 1, "loss": 0.1 + 0.2, "name": "π", "list": [1, None, True]}
    path = store.save(tmp_path / "new" / "checkpoints", 12, tensors, state, keep=1)
    assert path.name == "step-000012"
    loaded = store.load(path)
    assert loaded.step == 12
    assert loaded.state == state
    assert loaded.tensors.keys() == tensors.keys()
    for name, tensor in tensors["student"].items():
        got = loaded.tensors["student"][name]
        assert got.dtype == tensor.dtype and got.shape == tensor.shape
        assert (
            got.numpy().tobytes() == tensor.numpy().tobytes() if tensor.dtype != torch.bfloat16 else got.equal(tensor)
        )


def test_views_ties_overlaps_and_strides_are_written_as_they_look(tmp_path: Path) -> None:
    fused = torch.randn(12, 4)
    tensors = {
        "q": fused[:4],
        "k": fused[4:8],
        "v": fused[8:],
        "whole": fused,
        "overlap": fused[3:6],
        "tied": fused,
        "transposed": fused.t(),
        "every_other": fused[::2],
        "expanded": torch.ones(1, 3).expand(4, 3),
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }
    before = fused.clone()
    loaded = store.load(store.save(tmp_path, 1, {"m": tensors}, {}, keep=1)).tensors["m"]
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor.detach()), name
    assert torch.equal(fused, before)


@given(
    st.lists(
        st.tuples(st.integers(0, 11), st.integers(0, 12), st.integers(1, 3)).map(
            lambda t: slice(t[0], sum(t[:2]), t[2])
        ),
        min_size=1,
        max_size=6,
    )
)
def test_separate_leaves_no_common_memory(slices: list[slice]) -> None:
    base = torch.arange(12.0)
    group = {str(i): base[cut] for i, cut in enumerate(slices)}
    result = store._separate(group)
    spans = []
    for name, tensor in group.items():
        assert torch.equal(result[name], tensor)
        assert result[name].is_contiguous()
        if tensor.numel():
            spans.append((result[name].data_ptr(), result[name].data_ptr() + tensor.nbytes))
    spans.sort()
    assert all(first[1] <= second[0] for first, second in zip(spans, spans[1:], strict=False))


def test_disjoint_contiguous_tensors_are_not_copied() -> None:
    fused = torch.randn(6, 4)
    group = {"b": fused[3:], "a": fused[:3]}
    assert all(store._separate(group)[name].data_ptr() == group[name].data_ptr() for name in group)


def test_keep_deletes_only_the_oldest_and_latest_is_by_step(tmp_path: Path) -> None:
    assert store.latest(tmp_path / "absent") is None
    assert store.latest(tmp_path) is None
    for step in (9, 10, 100, 1_000_000):
        _save(tmp_path, step, keep=3)
    assert _steps(tmp_path) == ["step-000010", "step-000100", "step-1000000"]
    assert store.latest(tmp_path) == tmp_path / "step-1000000"


def test_same_step_is_replaced(tmp_path: Path) -> None:
    _save(tmp_path, 3, value=1.0)
    _save(tmp_path, 3, value=2.0)
    assert _steps(tmp_path) == ["step-000003"]
    assert store.load(tmp_path / "step-000003").tensors["student"]["w"][0] == 2.0


def test_later_steps_of_an_abandoned_course_are_kept_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (10, 20, 30):
        _save(tmp_path, step, keep=3)
    _save(tmp_path, 20, keep=1, value=7.0)
    assert _steps(tmp_path) == ["abandoned-step-000030", "step-000020"]
    assert "abandoned-step-000030" in caplog.text
    assert store.latest(tmp_path) == tmp_path / "step-000020"
    _save(tmp_path, 30, keep=1)
    _save(tmp_path, 25, keep=1)
    assert _steps(tmp_path) == ["abandoned-step-000030", "abandoned-step-000030-2", "step-000025"]


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step-000099").write_text("a file, no checkpoint")
    _save(tmp_path, 1, keep=1)
    _save(tmp_path, 2, keep=1)
    assert _steps(tmp_path) == ["notes.txt", "step-000002", "step-000099"]


def test_wrong_arguments_touch_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep"):
        store.save(tmp_path, 1, {}, {}, keep=0)
    with pytest.raises(ValueError, match="file name"):
        store.save(tmp_path, 1, {"../x": {}}, {}, keep=1)
    with pytest.raises(TypeError):
        store.save(tmp_path, 1, {}, {"x": object()}, keep=1)
    assert _steps(tmp_path) == []


def _model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))


def _step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model(torch.randn(5, 3, generator=generator)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_optimizer_goes_on_to_the_bit(tmp_path: Path, fused: bool, amsgrad: bool) -> None:
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused, amsgrad=amsgrad)
    for seed in range(3):
        _step(model, optimizer, seed)
    tensors = {
        "optimizer": optimizer_tensors(optimizer, dict(model.named_parameters())),
        "student": model.state_dict(),
    }
    assert "0.weight.exp_avg_sq" in tensors["optimizer"] and "1.bias.step" in tensors["optimizer"]
    loaded = store.load(store.save(tmp_path, 3, tensors, {}, keep=1))

    other = _model()
    other.load_state_dict(loaded.tensors["student"])
    # parameters in another order and other hyper-parameters: names decide, and the configuration rules
    resumed = torch.optim.AdamW(reversed(list(other.parameters())), lr=0.1, fused=fused, amsgrad=amsgrad)
    restore_optimizer(resumed, loaded.tensors["optimizer"], dict(other.named_parameters()))
    for seed in range(3, 6):
        _step(model, optimizer, seed)
        _step(other, resumed, seed)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name
    assert all(
        torch.equal(value, optimizer_tensors(resumed, dict(other.named_parameters()))[name])
        for name, value in optimizer_tensors(optimizer, dict(model.named_parameters())).items()
    )


def test_restored_state_is_a_copy_and_hyperparameters_stay(tmp_path: Path) -> None:
    model = _model()
    names = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    _step(model, optimizer, 0)
    tensors = {name: value.clone() for name, value in optimizer_tensors(optimizer, names).items()}
    fresh = torch.optim.AdamW(model.parameters(), lr=0.25)
    restore_optimizer(fresh, tensors, names)
    before = {name: value.clone() for name, value in tensors.items()}
    _step(model, fresh, 1)
    assert fresh.param_groups[0]["lr"] == 0.25
    assert all(torch.equal(before[name], tensors[name]) for name in tensors)


def test_moments_are_restored_into_the_memory_that_is_there() -> None:
    """A second copy of them, 24.7 GB of a 3B, would have to fit beside them."""
    model = _model()
    names = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters())
    _step(model, optimizer, 0)
    saved = {name: value.clone() for name, value in optimizer_tensors(optimizer, names).items()}
    _step(model, optimizer, 1)
    places = {name: value.data_ptr() for name, value in optimizer_tensors(optimizer, names).items()}
    with DeviceBytes() as device:
        restore_optimizer(optimizer, saved, names)
    assert device.peak_live == 0
    for name, value in optimizer_tensors(optimizer, names).items():
        assert torch.equal(value, saved[name]) and value.data_ptr() == places[name]


def test_optimizer_without_a_step(tmp_path: Path) -> None:
    model = _model()
    names = dict(model.named_parameters())
    assert optimizer_tensors(torch.optim.AdamW(model.parameters()), names) == {}
    stepped = torch.optim.AdamW(model.parameters())
    _step(model, stepped, 0)
    restore_optimizer(stepped, {}, names)
    assert all(not value.any() for state in stepped.state.values() for value in state.values())
    _step(model, stepped, 1)
    assert optimizer_tensors(stepped, names)["0.bias.step"] == 1


def test_optimizer_mismatches_are_told_and_change_nothing() -> None:
    model = _model()
    names = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters())
    _step(model, optimizer, 0)
    good = {name: value.clone() for name, value in optimizer_tensors(optimizer, names).items()}
    bad = [
        (good | {"2.weight.step": torch.tensor(1.0)}, "no parameter '2.weight'"),
        (good | {"0.weight.exp_avg": torch.zeros(4, 4)}, r"0\.weight\.exp_avg .*\[4, 4\]"),
        (good | {"0.weight.exp_avg": torch.zeros(4, 3).bfloat16()}, "bfloat16"),
        ({name: value for name, value in good.items() if name != "0.bias.exp_avg"}, "incomplete"),
        ({name: value for name, value in good.items() if not name.endswith("step")}, "incomplete"),
    ]
    for tensors, message in bad:
        with pytest.raises(UserError, match=message):
            restore_optimizer(optimizer, tensors, names)
    now = optimizer_tensors(optimizer, names)
    assert all(torch.equal(value, good[name]) for name, value in now.items())
    with pytest.raises(ValueError, match="names"):
        optimizer_tensors(optimizer, {"only": next(model.parameters())})


def _draw() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.standard_normal()),
        float(torch.rand(())),
        float(torch.randn(())),
    ]


def test_rng_goes_on_where_it_was(tmp_path: Path) -> None:
    # an odd number of draws leaves a cached gaussian in python's and numpy's generators
    _draw()
    rng = rng_state()
    path = store.save(tmp_path, 1, {"rng": rng.tensors}, {"rng": rng.state}, keep=1)
    expected = [_draw(), _draw()]
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(123)
    loaded = store.load(path)
    restore_rng(RngState(loaded.state["rng"], loaded.tensors["rng"]))
    assert [_draw(), _draw()] == expected


def test_rng_of_absent_gpus_is_told(caplog: pytest.LogCaptureFixture) -> None:
    rng = rng_state()
    restore_rng(RngState(rng.state, rng.tensors | {"cuda:99": rng.tensors["cpu"]}))
    assert "cuda:99" in caplog.text


def test_files_are_as_readable_as_others(tmp_path: Path) -> None:
    path = _save(tmp_path, 1)
    assert (path / "student.safetensors").stat().st_mode == (path / "state.json").stat().st_mode


def test_manifest_lists_every_file(tmp_path: Path) -> None:
    path = _save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    assert sorted(manifest["files"]) == sorted({file.name for file in path.iterdir()} - {"manifest.json"})
