"""The paper's findings, trained anew with seed 0; docs/measured/findings.md says in how many seeds each one held."""

from __future__ import annotations

import os

import pytest

from bench.paper.gates import GATES, Gate, outcomes
from bench.paper.language import Language
from bench.paper.language_runs import Experiment
from bench.paper.mixture import TEACHERS
from bench.paper.mixture_runs import ARMS, run

# The arms that fit into two minutes.
QUICK = ("seqkd", "gad", "oracle")
ALL = os.environ.get("GADCORE_PAPER_GATES") == "all"


def ids(gate: Gate) -> str:
    return f"{gate.experiment}: {gate.says}"


@pytest.fixture(scope="module")
def mixture() -> list[dict]:
    return [run(TEACHERS[0], arm, seed=0) for arm in (ARMS if ALL else QUICK)]


@pytest.fixture(scope="module")
def language() -> list[dict]:
    experiment = Experiment(Language("styles"), seed=0)
    return [experiment.run(arm) for arm in ("seqkd", "gad", "frozen", "no_student_warmup")]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("gate", [g for g in GATES if g.experiment == "mixture" and g.required], ids=ids)
def test_mixture(mixture, gate) -> None:
    if not ALL and not set(gate.arms) <= set(QUICK):
        pytest.skip("the frozen D takes another minute: set GADCORE_PAPER_GATES=all")
    assert outcomes(gate, mixture) == {0: True}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not ALL, reason="takes five minutes or more: set GADCORE_PAPER_GATES=all")
@pytest.mark.parametrize("gate", [g for g in GATES if g.experiment == "language" and g.required], ids=ids)
def test_language(language, gate) -> None:
    assert outcomes(gate, language) == {0: True}
