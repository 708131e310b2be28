"""What counts as reproduced, and docs/measured/findings.md."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from bench import __main__ as command
from bench import record
from bench.paper import gates, svg, tables


def mixture_row(arm: str, seed: int, reverse_kl: float) -> gates.Row:
    return {
        "experiment": "mixture", "geometry": "skewed", "arm": arm, "seed": seed, "reverse_kl": reverse_kl, "modes": 1,
        "forward_kl": 5.0, "on_mode": 0.9, "seconds": 2.0, "density": [0.5, 0.5], "curve": [],
    }  # fmt: skip


def test_gates_count_the_seeds_in_which_they_hold() -> None:
    (gate,) = [g for g in gates.GATES if g.says.startswith("a frozen D: reverse")]
    held = gates.outcomes(gate, [mixture_row("frozen", seed, kl) for seed, kl in enumerate((3.0, 1.0, 2.5))])
    assert held == {0: True, 1: False, 2: True}
    assert gates.verdict(held) == "mixed (2 of 3 seeds)"
    assert gates.verdict({0: True}) == "reproduced (1 of 1 seeds)"
    assert gates.verdict({0: False}) == "did not reproduce (0 of 1 seeds)"
    assert gates.verdict(gates.outcomes(gate, [])) == "not run"
    for held, word in ((10, "reproduced"), (8, "reproduced"), (7, "mixed"), (3, "mixed"), (2, "did not reproduce")):
        assert gates.verdict({s: s < held for s in range(10)}) == f"{word} ({held} of 10 seeds)"


def test_a_gate_that_compares_arms_needs_all_of_them() -> None:
    (gate,) = [g for g in gates.GATES if "oracle" in g.arms and g.required]
    rows = [mixture_row("gad", 0, 0.5), mixture_row("oracle", 0, 0.35), mixture_row("gad", 1, 0.4)]
    assert gates.outcomes(gate, rows) == {0: True}


def test_intervals() -> None:
    assert tables.estimate([0.5]) == "0.50"
    # t(2) = 4.30, sd 1, n 3
    assert tables.estimate([1.0, 2.0, 3.0]) == "2.00 ± 2.48"


def test_the_document_is_made_of_the_results() -> None:
    assert tables.DOCUMENT.read_text(encoding="utf-8") == tables.document()
    for name, drawing in tables.drawings(record.read(record.path_of("paper"))).items():
        assert (tables.IMAGES / name).read_text(encoding="utf-8") == drawing


def test_a_document_without_results_says_so() -> None:
    assert "Not run" in tables.document(lambda suite: [])


def test_drawings_are_well_formed_and_keep_to_their_area() -> None:
    drawing = svg.lines("a < b", "step", {"one": [[(0, 0.0), (10, 5.0)]], "two": [[(0, 1.0), (10, 1.0)]]}, top=1.0)
    root = ElementTree.fromstring(drawing)
    curves = [p.get("d") for p in root.iter("{http://www.w3.org/2000/svg}path") if p.get("fill") == "none"]
    assert len(curves) == 2
    heights = [float(point.split(",")[1]) for d in curves for point in d[1:].split("L")]
    assert min(heights) >= svg.TOP and max(heights) <= svg.HEIGHT - svg.BOTTOM


def test_the_command_refuses_what_it_does_not_have(capsys) -> None:
    assert command.main(["paper", "poetry"]) == 2
    assert "mixture, language, fresh" in capsys.readouterr().err
    assert command.main(["paper", "language", "--arms", "gad,ppo"]) == 2
    assert "no arm ppo of the language: there are before, seqkd, gad" in capsys.readouterr().err
