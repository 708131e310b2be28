"""D: scores of responses, and its Bradley-Terry pass."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gadcore.config.device import best_device
from gadcore.config.settings import DiscriminatorSettings
from gadcore.data.groups import Group, GroupTokens, MicroBatch, Prompt, Response
from gadcore.data.template import ChatTemplate
from gadcore.distributed import fsdp
from gadcore.distributed.world import ALONE, World
from gadcore.errors import UserError
from gadcore.kernels.bt_score import BTScore, bt_score
from gadcore.models.activations import Mode
from gadcore.models.backbone import last_hidden_states
from gadcore.models.bt_loss import score_penalty, softened_bt_loss
from gadcore.models.learner import Learner
from gadcore.models.precision import autocast
from gadcore.models.readout import together
from gadcore.models.scores import Scores
from gadcore.models.shared_base import SharedBase, load_scorer
from gadcore.models.spec import ModelSpec
from gadcore.models.text_groups import NO_ROW, Messages, ready, text_group


class Discriminator(Learner):
    """A language model with a scalar head, D(x, y) = w . h_last + b."""

    def __init__(
        self,
        model: PreTrainedModel,
        template: ChatTemplate,
        settings: DiscriminatorSettings,
        *,
        same_vocabulary: bool,
        micro_batch_tokens: int,
        activation_checkpointing: Mode | Literal["auto"] = "auto",
        tokenizer: PreTrainedTokenizerBase | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        world: World = ALONE,
    ) -> None:
        """model: from load_discriminator(). same_vocabulary: prompts' token ids are of D's own vocabulary.
        tokenizer: what save() writes; default the template's. optimizer: as of wrap().
        """
        super().__init__(
            model,
            settings,
            owner="discriminator",
            micro_batch_tokens=micro_batch_tokens,
            activation_checkpointing=activation_checkpointing,
            tokenizer=template.tokenizer if tokenizer is None else tokenizer,
            optimizer=optimizer,
            world=world,
        )
        self.template = template
        self.settings = settings
        self.same_vocabulary = same_vocabulary
        self.context_tokens = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        # By the identity of a row's prompt, which every batch that the row is in shares, and which is held here.
        self._rows: dict[int, tuple[Prompt, Response, tuple[int, ...], tuple[int, ...]]] = {}

    @classmethod
    def load(
        cls,
        model: str | ModelSpec,
        settings: DiscriminatorSettings | None = None,
        *,
        student: ModelSpec | None = None,
        device: torch.device | str | None = None,
        seed: int = 0,
        base: SharedBase | None = None,
        micro_batch_tokens: int = 16384,
        activation_checkpointing: Mode | Literal["auto"] = "auto",
        world: World = ALONE,
    ) -> Discriminator:
        """A discriminator from a model directory, a hub id or a bundled name, with the scalar head that is stored
        there, or a fresh one from `seed`.

        base: of a student with an adapter that was loaded from the same model, for an adapter and a head on it: nothing
        is loaded then. settings: default the paper's. student: whose vocabulary the prompts' token ids are of; default
        another one than D's. device: default the GPU where there is one. world: of several processes, each of which
        reads its shards alone, or all of the base of an adapter.
        Raises UserError where there is no such model, or where it does not fit packed groups.
        """
        spec = ModelSpec.resolve(model) if isinstance(model, str) else model
        settings = settings or DiscriminatorSettings()
        # A copy: it gets a padding token of D's own, and the student may have the same spec.
        tokenizer = copy.deepcopy(spec.tokenizer)
        loaded = load_scorer(
            spec,
            settings,
            device=best_device() if device is None else torch.device(device),
            seed=seed,
            tokenizer=tokenizer,
            base=base,
            world=world,
        )
        return cls(
            loaded,
            spec.template,
            settings,
            same_vocabulary=student is not None and spec.same_tokens(student),
            micro_batch_tokens=micro_batch_tokens,
            activation_checkpointing=activation_checkpointing,
            tokenizer=tokenizer,
            world=world,
        )

    def tokens(self, groups: Sequence[Group]) -> list[GroupTokens]:
        """[x | y_t | y_s^1 | ..] of every group in D's own vocabulary.

        Both sides are encoded from text in the same way, with the same end marker: nothing but the text and whether it
        ended by itself can tell teacher from student. So the token ids that a sample was drawn in are never taken, not
        even where they are of the same vocabulary: a text can be written in several ways, of which the teacher's is
        always the tokenizer's own. A row's prompt and teacher are encoded once, all samples of a batch by one call.

        No sample ends a run: one that is longer than D's context, or far longer here than as it was drawn and than a
        micro-batch, is cut, as a teacher's response is that exceeds its limit; one of no text that was cut is the
        prompt's last token once more. UserError where prompt and teacher exceed D's context.
        """
        return self._fitted(groups)[0]

    def _fitted(self, groups: Sequence[Group]) -> tuple[list[GroupTokens], int, int]:
        """(tokens(groups), samples that were cut for D, samples without text)."""
        rows = self._encoded(groups)
        samples = [sample for group in groups for sample in group.samples]
        encoded = iter(self.template.responses_ids([s.text for s in samples], [s.finished for s in samples]))
        found, cut, empty = [], 0, 0
        for group, (prompt, teacher) in zip(groups, rows, strict=True):
            needed, context = len(prompt) + len(teacher), self.context_tokens
            if context is not None and needed > context:
                raise UserError(_too_long(group, needed, context))
            responses = [teacher or prompt[-1:]]
            for sample in group.samples:
                ids = next(encoded)
                limit = max(2 * len(sample.token_ids), self.micro_batch_tokens - needed)
                if context is not None:
                    limit = min(limit, context - len(prompt))
                cut += len(ids) > limit
                empty += not ids
                # In a context that prompt and teacher fill, a sample has one token all the same.
                responses.append(ids[: max(limit, 1)] or prompt[-1:])
            found.append(GroupTokens(prompt, tuple(responses)))
        return found, cut, empty

    def _encoded(self, groups: Sequence[Group]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """(prompt, teacher) of every group in D's vocabulary, from what is known of its row or by the tokenizer."""
        new, rows = [], {}
        for group in groups:
            known = self._rows.get(id(group.prompt))
            if known is None or known[0] is not group.prompt or known[1] is not group.teacher:
                new.append(group)
            else:
                rows[id(group.prompt)] = known
        teachers = self.template.responses_ids(
            [group.teacher.text for group in new], [group.teacher.finished for group in new]
        )
        for group, ids in zip(new, teachers, strict=True):
            prompt, teacher = group.prompt, group.teacher
            # The student's ids where the vocabulary is shared: a prompt that was truncated stays truncated.
            prompt_ids = prompt.token_ids if self.same_vocabulary else self.template.prompt_ids(prompt.messages)
            # Mostly the row's own object: it takes no memory again.
            ids = teacher.token_ids if ids == teacher.token_ids else ids
            rows[id(prompt)] = prompt, teacher, tuple(prompt_ids), ids
            # No batch shares what is no row of a data set.
            if prompt.index != NO_ROW:
                self._rows[id(prompt)] = rows[id(prompt)]
        return [rows[id(group.prompt)][2:] for group in groups]

    def score(self, groups: Sequence[Group], *, backward: bool = False) -> Scores:
        """Scores every response of the batch in one pass, and with `backward` adds the BT gradient.

        The reward of a sample is the score inside this step's BT loss, so no separate scoring pass is needed;
        the weights do not change until step().
        """
        scoring = self.scoring(sum(len(group.samples) for group in groups), backward=backward)
        scoring.add(groups)
        return scoring.scores()

    def scoring(self, pairs: int, *, backward: bool = False) -> Scoring:
        """score() of a batch that comes in parts. pairs: samples of the whole batch."""
        return Scoring(self, pairs, backward=backward)

    def _score(self, micro: MicroBatch, denominator: int) -> BTScore:
        return fsdp.inside(self.model, lambda: self._scored(micro, denominator))

    def _scored(self, micro: MicroBatch, denominator: int) -> BTScore:
        batch, layout = micro.tokens, micro.sequences
        with autocast(self.settings.autocast, self.model.device):
            hidden = last_hidden_states(self.model, batch)
        head: nn.Linear = self.model.score  # type: ignore[assignment]
        result = bt_score(hidden, batch.packed_as, head.weight[0], head.bias, layout, denominator=denominator)
        smoothing, cap, l2 = self.settings.label_smoothing, self.settings.margin_cap, self.settings.score_l2
        if smoothing == 0 and cap is None and l2 == 0:
            return result
        # The op's own loss gets no gradient then; that of its scores is all that is needed.
        loss = softened_bt_loss(result.scores, layout, smoothing, cap)
        if l2:
            loss = loss + l2 * score_penalty(result.scores, layout)
        return result._replace(loss=loss / denominator)

    @classmethod
    def wrap(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: DiscriminatorSettings | None = None,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        micro_batch_tokens: int = 16384,
        activation_checkpointing: Mode | Literal["auto"] = "auto",
    ) -> Discriminator:
        """A discriminator from a model that is there: AutoModelForSequenceClassification with num_labels = 1, on
        whatever device it lies. It is changed in place: its layers compute by gadcore's functions from here on.

        tokenizer: a fast one with a chat template. settings: default the paper's; model, dtype have no effect.
        optimizer: any of torch over the model's parameters, its learning rates as they are until update(.., lr) or
        step(lr) gives one; default AdamW by the settings.
        Raises UserError where the model has no scalar head, where it does not fit packed groups, or where the tokenizer
        has no chat template that gadcore can use.
        """
        head, name = getattr(model, "score", None), model.config.name_or_path or type(model).__name__
        if not isinstance(head, nn.Linear) or head.out_features != 1:
            raise UserError(f"the model {name} has no scalar head `score`: load it with num_labels = 1")
        template = ready(model, tokenizer, name)
        return cls(
            model,
            template,
            settings or DiscriminatorSettings(),
            same_vocabulary=True,
            micro_batch_tokens=micro_batch_tokens,
            activation_checkpointing=activation_checkpointing,
            optimizer=optimizer,
        )

    def group(
        self,
        prompt: Messages,
        teacher: str,
        samples: Sequence[str],
        finished: Sequence[bool] | None = None,
        *,
        teacher_finished: bool = True,
    ) -> Group:
        """A group from text, by D's own chat template; see gadcore.models.text_groups.text_group()."""
        return text_group(self.template, prompt, teacher, samples, finished, teacher_finished=teacher_finished)

    def update(self, groups: Sequence[Group], lr: float | None = None) -> Scores:
        """One step of D: the scores of the groups under the weights from before it, with grad_norm.

        lr: of this step and of those that follow; default as it is. UserError, with the weights as they were and no
        gradient left, where the gradient is not finite or a group does not fit D's context.
        """
        try:
            scores = self.score(groups, backward=True)
            scores.grad_norm = self.step(lr)
        except BaseException:
            self.discard()
            raise
        return scores

    def warmup(
        self,
        groups: Sequence[Group],
        *,
        steps: int,
        batch_size: int = 16,
        lr: float | None = None,
        seed: int = 0,
        on_step: Callable[[Scores], object] = lambda scores: None,
    ) -> list[Scores]:
        """`steps` updates on batches of groups in an order that `seed` shuffles, anew for every pass over them.

        Returns what each found before its update; on_step is told of it at once. UserError without groups.
        """
        if not groups:
            raise UserError("the warmup has no groups: give some with samples")
        order, left, found = random.Random(seed), list[int](), []
        for _ in range(steps):
            left = left or order.sample(range(len(groups)), len(groups))
            batch, left = left[:batch_size], left[batch_size:]
            found.append(self.update([groups[i] for i in batch], lr))
            on_step(found[-1])
        return found


class Scoring:
    """A pass over one batch, part after part: what score() finds of the whole, and the same gradient.

    To the bit where parts are cut into the same micro-batches as the whole, else up to the order in which sums are
    added.
    """

    def __init__(self, discriminator: Discriminator, pairs: int, *, backward: bool) -> None:
        """pairs: samples of all parts together."""
        self._discriminator, self._pairs, self._backward = discriminator, pairs, backward
        zero = torch.zeros((), dtype=torch.float64, device=discriminator.model.device)
        self._figures = {"loss": zero, "accuracy": zero, "margin": zero}
        self._scores: list[Tensor] = []
        self._sizes: list[int] = []
        self._tokens = self._cut = self._empty = 0

    def add(self, groups: Sequence[Group]) -> None:
        """Scores every response of the next part of the batch, and with `backward` adds its gradient."""
        discriminator, pairs, backward = self._discriminator, self._pairs, self._backward
        tokens, cut, empty = discriminator._fitted(groups)
        sizes = [len(group.samples) for group in groups]
        # The greatest of all processes' is found; a teacher whose group is split has scores of several.
        nothing = 0.0 if discriminator.world.size == 1 else -torch.inf
        scores = torch.full((sum(sizes) + len(groups),), nothing, device=discriminator.model.device)
        for micro in discriminator.packed(tokens, teacher=True):
            with torch.set_grad_enabled(backward):
                result = discriminator._score(micro, denominator=pairs)
            made = result.scores.detach()
            scores = scores.to(made.dtype)
            if micro.idle:
                if backward:
                    # What the others gather and add up needs everybody: a gradient of 0.
                    (result.scores.sum() * 0.0).backward()
                continue
            if backward:
                result.loss.backward()
            found = {
                "loss": result.loss.detach(),
                "accuracy": result.accuracy.sum().double() / pairs,
                "margin": result.margin.sum().double() / pairs,
            }
            self._figures = {name: self._figures[name] + value for name, value in found.items()}
            scores = scores.index_copy(0, micro.index, made)
        self._scores.append(scores)
        self._sizes += sizes
        self._tokens += sum(group.tokens for group in tokens)
        self._cut, self._empty = self._cut + cut, self._empty + empty

    def scores(self) -> Scores:
        """Of all parts. Raises ValueError where they are not the whole batch."""
        if sum(self._sizes) != self._pairs:
            raise ValueError(f"{sum(self._sizes)} of {self._pairs} samples were scored")
        world = self._discriminator.world
        figures, everybody = together(world, self._figures, {}, torch.cat(self._scores))
        assert everybody is not None
        passed = Scores(everybody, self._sizes, figures, tokens=self._tokens)
        passed.cut, passed.empty = self._cut, self._empty
        return self._discriminator.later(passed) if self._backward else passed


def _too_long(group: Group, needed: int, context: int) -> str:
    if group.prompt.index == NO_ROW:
        return (
            f"a prompt with its teacher's response needs {needed} of the discriminator's tokens, its context has "
            f"{context}: shorten them, or choose another discriminator"
        )
    return (
        f"row {group.prompt.index} of the data (from 0) needs {needed} of the discriminator's tokens, its "
        f"context has {context}: lower data.max_prompt_tokens or data.max_response_tokens "
        "(they count the student's tokens), or choose another discriminator.model"
    )
