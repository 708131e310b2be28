"""GADServiceReward: the discriminator service as a reward function, for trainers that score in processes of their own.

TRL's AsyncGRPOTrainer (trl.experimental.async_grpo) asks for rewards in a process without a GPU, a group at a time:

    AsyncGRPOTrainer(.., reward_funcs=[GADServiceReward(tokenizer, url="http://127.0.0.1:8640")])

The service trains its discriminator on every group and takes the place of GADReward's callback as well: it keeps its
own checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from gadcore.errors import UserError
from gadcore.integrations.client import DEFAULT_URL, DiscriminatorClient, TextGroup
from gadcore.integrations.trl.rows import Prompt, Row, SampleTexts, groups_of, rows_of


class GADServiceReward:
    """A reward function that may be pickled. Whoever samples gives whole groups at a time.

    tokenizer: the student's. end_ids: token ids that end a completion, default the tokenizer's end of sequence.
    url, and the token in the environment's GADCORE_TOKEN: of the service. teacher_column: of the data set.
    trains: whether the service trains on what it scores; GRPOTrainer calls one reward function in training and in
    evaluation, and asks for one that trains to be GADReward.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        url: str = DEFAULT_URL,
        end_ids: Sequence[int] | None = None,
        teacher_column: str = "teacher_response",
        trains: bool = True,
    ) -> None:
        self.__name__ = "discriminator"
        # Tells what is no address before any sample is drawn.
        DiscriminatorClient(url)
        self.tokenizer, self.url, self.teacher_column, self.trains = tokenizer, url, teacher_column, trains
        self.end_ids = [tokenizer.eos_token_id] if end_ids is None else list(end_ids)
        self._client: DiscriminatorClient | None = None
        self._texts: SampleTexts | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Locks and connections are made anew where it is used.
        return {**self.__dict__, "_client": None, "_texts": None}

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        **columns: Any,
    ) -> list[float]:
        """D(x, y) of every completion, in their order. ServiceError with the service's sentence where it refuses."""
        if self.trains and "trainer_state" in columns:
            raise UserError(
                "GRPOTrainer scores evaluation by the same function, and a discriminator must not train on that: use "
                "GADReward there, or GADServiceReward(.., trains=False)"
            )
        self._texts = self._texts or SampleTexts(self.tokenizer, self.end_ids)
        self._client = self._client or DiscriminatorClient(self.url)
        rows = rows_of(prompts, completions, completion_ids, columns, self.teacher_column, self._texts)
        groups = [_text_group(group) for group in groups_of(rows)]
        answer = self._client.score_and_update(groups) if self.trains else self._client.score(groups)
        return [reward for group in answer.rewards for reward in group]


def _text_group(rows: Sequence[Row]) -> TextGroup:
    prompt = rows[0].prompt
    said: dict[str, Any] = {"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}
    return TextGroup(
        [row.text for row in rows], teacher_response=rows[0].teacher, finished=[row.finished for row in rows], **said
    )
