"""What a run leaves on the disk, beside what runs left."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from gadcore.config.loading import load
from gadcore.errors import UserError
from gadcore.plan import disk
from gadcore.plan.dimensions import read_dimensions
from tests.support.runs import run, tiny_arguments

SMOL = "smollm2-135m-instruct"
WHOLE = ["--student.adapter", "none", "--discriminator.adapter", "none"]
ADAPTERS = ["--student.adapter", "lora", "--discriminator.adapter", "lora"]


def test_the_default_job() -> None:
    steps = {"warmup": 10, "gad": 8}
    found, adapters, default = (disk.predict(load(given), SMOL, steps) for given in (WHOLE, ADAPTERS, []))
    assert found is not None and adapters is not None and default is not None
    assert adapters.checkpoint < found.checkpoint / 20
    # The student's adapter, and all of D.
    assert default.checkpoint == pytest.approx((adapters.checkpoint + found.checkpoint) / 2, rel=0.01)
    # Weights and two moments of two models of 134.5 million parameters in float32.
    assert found.checkpoint == pytest.approx(2 * 3 * 4 * 134.515e6, rel=0.01)
    assert found.checkpoints == 2 and found.peak >= found.left > found.checkpoint
    assert f"about {found.left / 1e9:.1f} GB" in found.sentence()


@pytest.mark.parametrize(
    ("every", "keep", "steps", "kept", "made"),
    [(2, 9, (3, 4), 5, 5), (2, 2, (3, 4), 2, 5), (50, 2, (3, 4), 2, 2), (0, 2, (3, 4), 0, 0), (1, 9, (0, 4), 5, 5)],
)
def test_checkpoints_that_stay(every: int, keep: int, steps: tuple[int, int], kept: int, made: int) -> None:
    config = load(["--checkpoint.every", str(every), "--checkpoint.keep", str(keep)])
    d = read_dimensions(SMOL)
    found = disk.disk_of(config, d, d, steps)
    assert found.checkpoints == kept
    assert (found.peak - found.models) // found.checkpoint == min(keep + 1, made)


def test_seqkd_and_smaller_items_take_less() -> None:
    d = read_dimensions(SMOL)
    whole = disk.disk_of(load([*WHOLE, "--algorithm.kl_coef", "0"]), d, d, (4,))
    alone = disk.disk_of(load(WHOLE), d, None, (4,))
    half = disk.disk_of(load([*WHOLE, "--student.dtype", "bfloat16"]), d, None, (4,))
    assert whole.models == alone.models + 4 * d.scalar_parameters
    assert alone.models == 2 * half.models == 4 * d.parameters
    with_reference = disk.disk_of(load([*WHOLE, "--algorithm.kl_coef", "0.1"]), d, d, (4,))
    assert with_reference.models == whole.models + 4 * d.parameters


def test_an_unknown_model_is_not_predicted() -> None:
    assert disk.predict(load([]), "nobody/knows-it", {"gad": 1}) is None


def test_too_little_disk_is_told_before_a_folder_is_made(tmp_path: Path, monkeypatch) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    found = disk.Disk(checkpoint=10**9, checkpoints=1, models=0, peak=2 * 10**9)
    with pytest.raises(UserError, match=r"1\.0 GB free.*2\.0 GB"):
        disk.check(found, tmp_path / "not" / "there")
    disk.check(found._replace(peak=10**9), tmp_path / "not" / "there")


def test_as_a_run_leaves_it(tmp_path: Path) -> None:
    arguments = tiny_arguments(tmp_path)
    done = run([*arguments, "--run.dir", "run"], tmp_path)
    assert done.returncode == 0, done.stderr
    config = load(arguments)
    predicted = disk.predict(config, config.student.model, {"warmup": 3, "gad": 4})
    weights = sum(file.stat().st_size for file in (tmp_path / "run").rglob("*.safetensors"))
    assert predicted is not None and weights == pytest.approx(predicted.left, rel=0.05)
