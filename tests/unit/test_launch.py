"""The recipes of examples/launch are what the shell, YAML and gadcore's settings take."""

from __future__ import annotations

import re
import subprocess

import pytest
import yaml

from gadcore.config.command_line import setting_kinds
from gadcore.config.loading import presets
from gadcore.config.settings import Config
from tests.support.runs import ROOT

LAUNCH = ROOT / "examples/launch"


def scripts() -> dict[str, str]:
    """name -> shell script; of SkyPilot what its `run` does."""
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert task["num_nodes"] == 2 and task["resources"]["accelerators"] == "H100:8"
    assert task["setup"].strip() in (ROOT / "docs/guide/install.md").read_text()
    return {"slurm": (LAUNCH / "slurm.sbatch").read_text(), "skypilot": task["run"]}


def test_every_recipe_is_looked_at() -> None:
    assert {path.name for path in LAUNCH.iterdir()} == {"slurm.sbatch", "skypilot.yaml"}


@pytest.mark.parametrize("name", ["slurm", "skypilot"])
def test_a_recipe_starts_a_run_and_goes_on_with_it(name: str) -> None:
    script = scripts()[name]
    checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert "torchrun" in script and "-m gadcore.run" in script and "--max-restarts" in script
    assert "--run.dir" in script and "--resume auto" in script and '[ -f "$RUN/config.toml" ]' in script
    settings = set(re.findall(r"--(\w+\.\w+)", script))
    assert settings and settings <= set(setting_kinds(Config))
    assert set(re.findall(r"--preset ([\w.-]+)", script)) <= set(presets())
