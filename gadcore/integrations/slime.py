"""GAD in slime (0.3): a reward function for whole groups, by the discriminator service.

    train.py .. --label-key label --group-rm --custom-rm-path gadcore.integrations.slime.reward

Labels: see gadcore.integrations.text_rewards; where slime renders the chat template (--apply-chat-template) the label
must bring its own prompt or a row. An evaluation scores one sample at a time, and trains nothing.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence
from typing import Any

from gadcore.errors import UserError
from gadcore.integrations.text_rewards import Sample, by_prompt, is_held_out, scores, without_end


async def reward(args: Any, samples: Any, **_: Any) -> list[float] | float:
    """The score of every sample of a list, or of the one sample of an evaluation.

    args: slime's, of which hf_checkpoint names the tokenizer. samples: slime.utils.types.Sample, or a list of them.
    """
    markers = _markers(args.hf_checkpoint)
    if not isinstance(samples, Sequence):
        if not is_held_out(samples.label):
            raise UserError(
                "slime asks for the score of a single sample: give --group-rm for training, and labels with "
                '"held_out": true for an evaluation'
            )
        ((score,),) = await asyncio.to_thread(scores, [(samples.label, samples.prompt, [_sample(samples, markers)])])
        return score
    places = by_prompt([_group(sample, place) for place, sample in enumerate(samples)])
    groups = [
        (samples[own[0]].label, samples[own[0]].prompt, [_sample(samples[i], markers) for i in own]) for own in places
    ]
    found = await asyncio.to_thread(scores, groups)
    by_place = {i: score for own, row in zip(places, found, strict=True) for i, score in zip(own, row, strict=True)}
    return [by_place[i] for i in range(len(samples))]


def _group(sample: Any, place: int) -> Any:
    return ("alone", place) if sample.group_index is None else sample.group_index


def _sample(sample: Any, markers: Sequence[str]) -> Sample:
    finished = sample.status is type(sample.status).COMPLETED
    return Sample(without_end(sample.response, markers) if finished else sample.response, finished)


@functools.cache
def _markers(checkpoint: str) -> tuple[str, ...]:
    from transformers import AutoTokenizer

    return tuple(AutoTokenizer.from_pretrained(checkpoint).all_special_tokens)
