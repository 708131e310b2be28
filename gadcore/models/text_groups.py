"""Groups from text: what a caller outside of gadcore has of a prompt, its teacher and its samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gadcore.data.groups import Group, Prompt, Response
from gadcore.data.template import ChatTemplate
from gadcore.errors import UserError
from gadcore.models.backbone import use_packed_attention
from gadcore.models.checks import check_packing

# The index of a prompt that is no row of a data set.
NO_ROW = -1
ROLES = ("system", "user", "assistant", "tool")
Messages = str | Sequence[Mapping[str, str]]


def text_group(
    template: ChatTemplate,
    prompt: Messages,
    teacher: str,
    samples: Sequence[str],
    finished: Sequence[bool] | None = None,
    *,
    teacher_finished: bool = True,
    logprobs: Sequence[Sequence[float]] | None = None,
) -> Group:
    """A group in the vocabulary of `template`.

    prompt: text, which becomes a user's turn, or messages {"role": .., "content": ..} whose last one is the user's.
    teacher: its response, without an end marker; one that is written behind it as text is taken off.
    samples: the student's responses, without end markers. finished: whether each ended by itself, else a limit cut it;
      default all did. teacher_finished: the same of the teacher's.
    logprobs: of every token of every sample under softmax(logits / T), the end marker's included; default 0, which the
      metrics alone then show.

    Raises UserError for what is no prompt, for a teacher's response without text, and where lengths do not agree.
    """
    if isinstance(samples, str):
        raise UserError("samples is one text: give a list of texts")
    ended = [True] * len(samples) if finished is None else list(finished)
    if len(ended) != len(samples):
        raise UserError(f"finished has {len(ended)} entries for {len(samples)} samples: give one a sample")
    said = template.without_end(teacher)
    if not said.strip():
        raise UserError("the teacher's response has no text: leave this prompt out")
    messages = tuple(template.conversation(_messages(prompt)))
    ids = template.responses_ids([said, *samples], [teacher_finished, *ended])
    given = [(0.0,) * len(own) for own in ids[1:]] if logprobs is None else [tuple(row) for row in logprobs]
    if [len(row) for row in given] != [len(own) for own in ids[1:]]:
        raise UserError(
            f"logprobs has rows of {[len(row) for row in given]} numbers, the samples have "
            f"{[len(own) for own in ids[1:]]} tokens in this vocabulary, end markers included: give one a token"
        )
    drawn = [Response(text, own, end, row) for text, own, end, row in zip(samples, ids[1:], ended, given, strict=True)]
    return Group(
        Prompt(NO_ROW, messages, template.prompt_ids(messages)), Response(said, ids[0], teacher_finished), drawn
    )


def _messages(prompt: Messages) -> list[Mapping[str, str]]:
    turns: list[Mapping[str, str]] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    for turn in turns:
        if not isinstance(turn, Mapping) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise UserError(f'a message must be {{"role": text, "content": text}}, not {turn!r}')
        if turn["role"] not in ROLES:
            raise UserError(f"a message has the role {turn['role']!r}: use one of {', '.join(ROLES)}")
    if not turns or turns[-1]["role"] != "user":
        found = repr(turns[-1]["role"]) if turns else "no message at all"
        raise UserError(f"the turn that is answered must be the user's, found {found}")
    if not turns[-1]["content"].strip():
        raise UserError("the prompt has no text: leave it out")
    return turns


def ready(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> ChatTemplate:
    """Makes a model of somebody else's take packed groups, and gives the template of its tokenizer.

    name: of the model in errors. Raises UserError where it does not fit, or the tokenizer's template cannot be used.
    """
    template = ChatTemplate(tokenizer, vocabulary=getattr(model.config.get_text_config(), "vocab_size", None))
    model.eval()
    use_packed_attention(model)
    check_packing(model, name)
    return template
