"""What lets gadcore's own code train toys: words for tokens, a sampler, an oracle in D's place, a trainer in memory.

Everything that learns goes through gadcore.algorithm's stages, gadcore's own Trainer, Student and Discriminator; what
is here stands at their borders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, cast

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from gadcore.algorithm import STAGES
from gadcore.config.settings import Config, DiscriminatorSettings
from gadcore.data.batches import Loader
from gadcore.data.groups import Group, Prompt, Response
from gadcore.data.template import ChatTemplate
from gadcore.kernels.layout import PrefixLayout
from gadcore.models.discriminator import Discriminator, Scores
from gadcore.models.student import Student
from gadcore.rollout.engine import Engine, SampleRequest
from gadcore.rollout.sampler import Sampler
from gadcore.rollout.weights import PlainWeights, WeightSource
from gadcore.train.records import Records
from gadcore.train.trainer import Trainer

SPECIAL = ("<unk>", "<sep>", "<end>")
_TURNS = "{% for m in messages %}{{ m['content'] + (' <sep> ' if m['role'] == 'user' else ' <end>') }}{% endfor %}"


class WordTemplate(ChatTemplate):
    """A chat template over whole words: a prompt is its words and <sep>, a finished response ends with <end>."""

    def __init__(self, words: Sequence[str]) -> None:
        vocabulary = {word: i for i, word in enumerate((*SPECIAL, *words))}
        words_of = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        words_of.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        # The same few texts come again and again, and the tokenizer would take most of a toy's time.
        self._ids = cache(super().response_ids)
        super().__init__(
            PreTrainedTokenizerFast(
                tokenizer_object=words_of,
                unk_token="<unk>",
                eos_token="<end>",
                additional_special_tokens=["<sep>"],
                chat_template=_TURNS,
            )
        )
        self.vocabulary = vocabulary

    def response_ids(self, text: str, *, finished: bool, limit: int | None = None) -> tuple[int, ...]:
        return self._ids(text, finished=finished, limit=limit)

    def group(self, index: int, prompt: str, response: str, *, finished: bool = True) -> Group:
        """A group without samples from a prompt's and its teacher's words."""
        messages = ({"role": "user", "content": prompt},)
        teacher = Response(response, self.response_ids(response, finished=finished), finished)
        return Group(Prompt(index, messages, self.prompt_ids(messages)), teacher)


class ToyEngine(Engine):
    """gadcore.rollout's Engine for policies whose next token depends on the prompt, the last token and its position.

    So no cache of keys is needed, and all samples of a batch take a token in one pass.
    """

    def __init__(self, model: PreTrainedModel, template: ChatTemplate) -> None:
        self.model, self.template = model, template

    @torch.no_grad()
    def generate(
        self, requests: Sequence[SampleRequest], *, temperature: float, max_tokens: int
    ) -> list[list[Response]]:
        # A row of random numbers for every sample, from its request's seed alone.
        random = torch.cat(
            [torch.rand(r.n, max_tokens, generator=torch.Generator().manual_seed(r.seed)) for r in requests]
        )
        of_sample = torch.tensor([g for g, r in enumerate(requests) for _ in range(r.n)])
        hidden = self._begin(requests)[of_sample]
        tokens: list[Tensor] = []
        logprobs: list[Tensor] = []
        ended = torch.zeros(len(random), dtype=torch.bool)
        for t in range(max_tokens):
            logits = self.model.get_output_embeddings()(hidden)
            logprob = (logits / (temperature or 1.0)).log_softmax(-1)
            if temperature == 0:
                token = logits.argmax(-1)
            else:
                cumulated = logprob.exp().cumsum(-1)
                token = (cumulated < random[:, t : t + 1] * cumulated[:, -1:]).sum(-1)
            tokens.append(token)
            logprobs.append(logprob.gather(-1, token[:, None])[:, 0])
            ended |= token == self.template.end_id
            if ended.all():
                break
            if t + 1 < max_tokens:
                hidden = self._next(requests, of_sample, token, t)
        rows = zip(torch.stack(tokens, 1).tolist(), torch.stack(logprobs, 1).tolist(), strict=True)
        samples = iter([self._response(*row) for row in rows])
        return [[next(samples) for _ in range(request.n)] for request in requests]

    def _begin(self, requests: Sequence[SampleRequest]) -> Tensor:
        """Hidden states [G, H] at the prompts' ends."""
        return self._states(requests, None, 0)

    def _next(self, requests: Sequence[SampleRequest], of_sample: Tensor, token: Tensor, t: int) -> Tensor:
        """Hidden states [S, H] at the samples' last tokens; equal tokens after one prompt go through the model once."""
        pairs, which = torch.stack([of_sample, token]).unique(dim=1, return_inverse=True)
        counts = pairs[0].bincount(minlength=len(requests)).tolist()
        return self._states(requests, pairs[1].split(counts), t)[which]

    def _states(self, requests: Sequence[SampleRequest], last: Sequence[Tensor] | None, t: int) -> Tensor:
        """Hidden states that predict the next token: [G, H] at the prompts' ends, or at the tokens of `last`."""
        ids: list[int] = []
        positions: list[int] = []
        at: list[int] = []
        for g, request in enumerate(requests):
            prompt, tokens = len(request.prompt_ids), [] if last is None else last[g].tolist()
            at += range(len(ids) + prompt, len(ids) + prompt + len(tokens)) if tokens else [len(ids) + prompt - 1]
            ids += [*request.prompt_ids, *tokens]
            positions += [*range(prompt), *[prompt + t] * len(tokens)]
        counts = [0] * len(requests) if last is None else [len(tokens) for tokens in last]
        layout = PrefixLayout.of([len(r.prompt_ids) for r in requests], [[1] * n for n in counts])
        out = self.model.base_model(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.empty(1, 1, 1, 1),
            position_ids=torch.tensor([positions]),
            use_cache=False,
            prefix_layout=layout,
        )
        return out.last_hidden_state[0, torch.tensor(at)]

    def _response(self, ids: list[int], logprobs: list[float]) -> Response:
        end = self.template.end_id
        length = ids.index(end) + 1 if end in ids else len(ids)
        text, finished = self.template.text_of(ids[:length])
        return Response(text, tuple(ids[:length]), finished, tuple(logprobs[:length]))

    def update_weights(self, source: WeightSource) -> None:
        """Nothing to do: the weights are the trainer's own."""

    def weights(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())


class Oracle:
    """The best discriminator there is, in gadcore.models.discriminator's place: D(x, y) = log p(y | x) - log q(y | x).

    It is the optimum of the Bradley-Terry loss (up to a constant for every x), and with it the policy gradient without
    normalised advantages is that of -KL(q || p): it tells a weak D from a mistake elsewhere. It learns nothing.

    teacher: log p(y | x). student: log q(y | x) of a teacher's response; samples carry their own.
    """

    def __init__(
        self,
        settings: DiscriminatorSettings,
        teacher: Callable[[Prompt, Response], float],
        student: Callable[[Prompt, Response], float],
    ) -> None:
        self.settings = settings
        self._teacher, self._student = teacher, student

    def score(self, groups: Sequence[Group], *, backward: bool) -> Scores:
        rewards = [[self._teacher(g.prompt, s) - sum(s.logprobs) for s in g.samples] for g in groups]
        return Scores.of(
            rewards, [self._teacher(g.prompt, g.teacher) - self._student(g.prompt, g.teacher) for g in groups]
        )

    def scoring(self, pairs: int, *, backward: bool) -> _Scoring:
        return _Scoring(self)

    def step(self) -> float:
        return 0.0


class _Scoring:
    """Scores of a batch that comes in parts, in gadcore.models.discriminator.Scoring's place."""

    def __init__(self, oracle: Oracle) -> None:
        self._oracle = oracle
        self._groups: list[Group] = []

    def add(self, groups: Sequence[Group]) -> None:
        self._groups += groups

    def scores(self) -> Scores:
        return self._oracle.score(self._groups, backward=False)


class Watch(Records):
    """Calls `look` with every row of metrics, after its step."""

    def __init__(self, look: Callable[[dict[str, Any]], None]) -> None:
        self._look = look

    def step(self, place: dict[str, Any], values: Mapping[str, float]) -> None:
        self._look({**place, **values})


def run(
    config: Config,
    stage: str,
    student: Student,
    discriminator: Discriminator | Oracle | None,
    groups: Sequence[Group],
    template: ChatTemplate,
    look: Callable[[dict[str, Any]], None],
    engine: type[ToyEngine] = ToyEngine,
) -> None:
    """One of gadcore.algorithm's stages by gadcore's own Trainer, with nothing written to a disk.

    look: gets the row of metrics of every step, after the step.
    """
    sampler = Sampler(
        engine(student.model, template),
        PlainWeights(student.model),
        temperature=config.rollout.temperature,
        max_tokens=config.data.max_response_tokens,
        seed=config.run.seed,
    )
    trainer = Trainer(
        config,
        (stage,),
        student=student,
        discriminator=cast(Discriminator, discriminator),
        sampler=sampler,
        loader=Loader(groups, config.schedule.batch_size, config.run.seed),
        records=Watch(look),
    )
    STAGES[stage](trainer)


def settings(values: dict[str, dict[str, Any]]) -> Config:
    """A Config whose stages last as long as schedule.<stage>_steps says, by whole words of toys' own."""
    schedule = dict.fromkeys(("warmup_epochs", "gad_epochs", "seqkd_epochs"), 10**6)
    schedule |= {"activation_checkpointing": "off", "micro_batch_tokens": 10**6} | values.get("schedule", {})
    quiet = {"checkpoint": {"every": 0}, "tracking": {"sample_every": 0}}
    return Config.model_validate({**quiet, **values, "schedule": schedule})
