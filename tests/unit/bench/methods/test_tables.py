"""What is claimed of methods beside each other, and docs/measured/methods.md."""

from __future__ import annotations

import random

import pytest

from bench import __main__ as command
from bench import record
from bench.methods import results, tables
from bench.methods.recipes import METHODS, RECIPES, Lengths, training_settings
from bench.methods.suite import stretched
from gadcore.config import loading
from gadcore.config.settings import Config


def row(method: str, seed: int, mean: float, *, budget: str = "data", spread: float = 0.05) -> dict:
    """40 prompts around a mean; prompts are harder and easier for every method alike."""
    own, prompts = random.Random(f"{method} {seed}"), random.Random(7)
    values = " ".join(f"{mean + prompts.gauss(0, 0.1) + own.gauss(0, spread):.4g}" for _ in range(40))
    sets = {each: {"style": values, "words": values} for each in ("held_out", "elsewhere")}
    return {
        "data": "house", "method": method, "budget": budget, "seed": seed, "sets": sets, "steps": {"seqkd": 3},
        "seconds": {"seqkd": 10.0},
    }  # fmt: skip


def test_a_difference_that_prompts_and_seeds_show_is_claimed_with_its_direction() -> None:
    rows = [row("gad_plateau", s, 0.8) for s in range(3)] + [row("seqkd", s, 0.6) for s in range(3)]
    found = results.compared(rows, "gad_plateau", "seqkd", "held_out", "style")
    assert found.holds and found.better and found.seeds == 3
    assert found.over_prompts.mean == pytest.approx(0.2, abs=0.03)
    said = tables.take_away(rows, "house")
    assert "At equal data (3 seeds): `gad_plateau` is better than `seqkd` (+0." in said
    swapped = [{**r, "method": {"seqkd": "gad_plateau", "gad_plateau": "seqkd"}[r["method"]]} for r in rows]
    assert "`gad_plateau` is worse than `seqkd` (-0." in tables.take_away(swapped, "house")


def test_nothing_is_claimed_where_an_interval_holds_0() -> None:
    alike = [row("gad_plateau", 0, 0.7), row("seqkd", 0, 0.7)]
    assert "no difference is shown between `gad_plateau` and `seqkd`" in tables.take_away(alike, "house")
    assert "one seed, so nothing is known of other runs" in tables.take_away(alike, "house")
    # Over prompts it is clear in the mean of the seeds, which themselves point both ways.
    torn = [row("gad_plateau", s, mean) for s, mean in enumerate((0.95, 0.6, 0.75))]
    torn += [row("seqkd", s, 0.65) for s in range(3)]
    found = results.compared(torn, "gad_plateau", "seqkd", "held_out", "style")
    assert found.over_prompts.low > 0 and not found.holds


def test_methods_are_compared_over_the_seeds_that_both_have() -> None:
    rows = [row("gad_plateau", s, 0.8) for s in range(3)] + [row("seqkd", 1, 0.6)]
    found = results.compared(rows, "gad_plateau", "seqkd", "held_out", "style")
    assert found.seeds == 1 and found.over_seeds is None
    assert results.compared(rows, "gad_plateau", "soda", "held_out", "style") is None
    assert results.compared(rows, "gad_plateau", "seqkd", "held_out", "right") is None


def test_a_stage_is_stretched_to_the_seconds_that_are_given() -> None:
    assert stretched("gad", {"sft": 10, "gad": 5}, {"sft": 20.0, "gad": 10.0}, 50.0) == {"sft": 10, "gad": 15}
    assert stretched("warmup", {"warmup": 10, "gad": 5}, {"warmup": 20.0, "gad": 60.0}, 50.0)["warmup"] == 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("data", RECIPES)
def test_every_method_makes_as_many_steps_and_its_settings_are_known(method, data) -> None:
    recipe = RECIPES[data]
    steps = METHODS[method].steps(recipe.lengths)
    assert sum(steps.values()) == recipe.lengths.total and METHODS[method].stretched in steps
    given = [f"--{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in
             training_settings(method, recipe, steps).items()]  # fmt: skip
    config = loading.load(given, Config)
    assert {stage: getattr(config.schedule, f"{stage}_steps") for stage in steps} == steps
    assert config.algorithm.freeze_discriminator == (method == "gad_frozen")


def test_lengths_add_up() -> None:
    assert Lengths(102, 10, 30).total == 142


def test_the_document_is_made_of_the_results() -> None:
    assert tables.DOCUMENT.read_text(encoding="utf-8") == tables.document()
    for name, drawing in tables.drawings(record.read(record.path_of("methods"))).items():
        assert (tables.IMAGES / name).read_text(encoding="utf-8") == drawing


def test_the_document_shows_what_was_run_and_the_predictions_of_what_was_not() -> None:
    rows = [row("gad_plateau", 0, 0.8), row("seqkd", 0, 0.6), row("seqkd", 0, 0.6, budget="seconds")]
    text = tables.document(lambda suite: rows)
    assert "| gad_plateau - seqkd |" in text and "### At equal seconds, house" in text
    assert text.count("Written before it ran: GAD must") == 2 and text.count("Not run.") == 2
    assert "methods-house.svg" in tables.drawings(rows)
    assert "Not run: there is no" in tables.document(lambda suite: [])


def test_the_command_refuses_what_it_does_not_have(capsys) -> None:
    assert command.main(["methods", "--methods", "ppo"]) == 2
    assert "no method ppo: there are gad_plateau, seqkd, soda, gad, gad_frozen" in capsys.readouterr().err
    assert command.main(["methods", "--budgets", "tokens"]) == 2
    assert "no budget tokens: there are data, seconds" in capsys.readouterr().err
