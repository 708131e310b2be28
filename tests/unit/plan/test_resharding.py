"""What `plan` says of a sync over several ranks; bench/reshard counts the real ones."""

from __future__ import annotations

import pytest

from gadcore.config.settings import Config, HFRollout, VLLMRollout
from gadcore.errors import UserError
from gadcore.plan.memory import Choice
from gadcore.plan.resharding import of_case
from gadcore.plan.time import synchronise_seconds
from tests.support.plan_cases import round_case


@pytest.mark.parametrize(("ranks", "rollout"), [(1, VLLMRollout()), (4, HFRollout())])
def test_there_is_nothing_to_count_without_shards(ranks: int, rollout) -> None:
    with pytest.raises(UserError, match="plan.resharding = true is for several ranks whose sampler is vLLM"):
        of_case(round_case(kind="cuda", ranks=ranks, config=Config(rollout=rollout)))


def test_a_sampler_over_more_ranks_is_synchronised_sooner() -> None:
    case = round_case(kind="cuda", ranks=8, config=Config(rollout=VLLMRollout(dtype="bfloat16")))
    seconds = [synchronise_seconds(case, Choice("off", 1024, 0.0, degree)) for degree in (1, 2, 4, 8)]
    assert seconds == sorted(seconds, reverse=True) and len(set(seconds)) == 4 and seconds[-1] > 0
