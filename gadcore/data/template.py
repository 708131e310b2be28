"""The chat template of one tokenizer: prompts, responses and the end marker, in token ids.

The teacher's text and a finished sample of the student must be the same kind of sequence, or the discriminator learns
to tell them by their end marker instead of their words. So a response is always: the ids of its text, then, where it
ended by itself, the marker that the chat template puts after an assistant turn.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from gadcore.data.rendering import (
    Message,
    difference,
    name_of,
    render,
    set_arguments,
    set_header,
    try_template,
    unused_arguments,
)
from gadcore.errors import UserError

_PROBE: list[Message] = [{"role": "user", "content": "Hello"}]
_SENTINEL = "Sentinel answer"
# What a turn is found out by: a question, and a question after a turn.
_CONVERSATIONS: tuple[list[Message], ...] = (
    _PROBE,
    [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "There."}, *_PROBE],
)


class ChatTemplate:
    """Renders conversations and responses for one fast tokenizer from transformers.

    system_prompt: put before conversations that have no system message; None leaves them to the template, which may
      add its model's own.
    arguments: given to the template wherever it is rendered, for example {"enable_thinking": False}.
    vocabulary: tokens that the model has embeddings for; None: not known.

    tokenizer: the one given, its chat template changed where that is needed (gadcore.data.rendering): `arguments` are
      its defaults, and the header of a prompt is the one that an assistant's last turn has.
    end_id: the end marker, a special token: found by rendering an assistant turn and looking at what follows its text.
    notes: what was changed, in sentences.

    Raises UserError for a tokenizer without a chat template, without an end marker, with tokens that the model does not
    have, or whose template renders an assistant turn otherwise than as prompt, text, end marker, or takes seconds or
    half a gigabyte for it.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        system_prompt: str | None = None,
        arguments: Mapping[str, Any] | None = None,
        vocabulary: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.notes: list[str] = []
        self._arguments = dict(arguments or {})
        self._system_prompt = system_prompt
        self._vocabulary = vocabulary
        self._lock = threading.Lock()
        self._name = name_of(tokenizer)
        if not tokenizer.is_fast:
            raise UserError(f"the tokenizer of {self._name} has no tokenizer.json: convert it to a fast tokenizer")
        if not tokenizer.chat_template:
            raise UserError(
                f"the tokenizer of {self._name} has no chat template: use an instruction-tuned model, or add a "
                "chat_template.jinja to its directory"
            )
        set_arguments(tokenizer, self._arguments)
        tried = [*_CONVERSATIONS, *(self._answered(conversation) for conversation in _CONVERSATIONS)]
        try_template(tokenizer, [self.conversation(conversation) for conversation in tried])
        self._check_vocabulary()
        # Text between a response and its marker, and text before a response by which its first token is chosen.
        self._gap, self._anchor = "", ""
        self.end_id = self._find_end()
        ends = {self.end_text, tokenizer.eos_token}
        self._end_texts = tuple(sorted(end for end in ends if end))
        self._find_header()

    def unused_arguments(self) -> list[str]:
        """Names of arguments that the template does not read."""
        return unused_arguments(self.tokenizer, self._arguments)

    def conversation(self, messages: Sequence[Message]) -> list[dict[str, str]]:
        """The messages with the system prompt in front, where one is set and the messages have none."""
        turns = [dict(message) for message in messages]
        if self._system_prompt is None or any(turn["role"] == "system" for turn in turns):
            return turns
        return [{"role": "system", "content": self._system_prompt}, *turns]

    def prompt_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """A conversation up to and including the header of the assistant's turn.

        Raises UserError where the model has no embedding for one of its tokens.
        """
        return self.embedded(self._encode(self._render(messages, header=True)))

    def embedded(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """The ids of a prompt, all of which the model must have an embedding for."""
        if self._vocabulary is not None and max(ids, default=0) >= self._vocabulary:
            token = self.tokenizer.convert_ids_to_tokens(max(ids))
            raise UserError(
                f"the tokenizer of {self._name} gives {token!r} the id {max(ids)}, the model has embeddings for "
                f"{self._vocabulary} tokens: leave that text out, or choose a model that has it"
            )
        return ids

    def rendered(self, messages: Sequence[Message]) -> str:
        """The text of a conversation up to and including the header of the assistant's turn."""
        return self._render(messages, header=True)

    def encode_all(self, rendered: Sequence[str]) -> list[tuple[int, ...]]:
        """prompt_ids() of many rendered prompts by one call of the tokenizer; embedded() is the caller's to ask."""
        return [tuple(ids) for ids in self._tokenize(list(rendered))["input_ids"]] if rendered else []

    @property
    def end_text(self) -> str:
        """The end marker as text."""
        return str(self.tokenizer.convert_ids_to_tokens(self.end_id))

    def without_end(self, text: str) -> str:
        """A response's text without end markers that were written behind it as text."""
        kept = text
        while (bare := kept.rstrip()).endswith(self._end_texts):
            kept = bare[: -max(len(end) for end in self._end_texts if bare.endswith(end))]
        return kept

    def fingerprint(self) -> str:
        """Equal where every conversation and response gets the same ids."""
        tokenizer = self.tokenizer
        settings = {key: value for key, value in vars(self).items() if key not in ("tokenizer", "_lock", "_name")}
        content = (tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, sorted(settings.items()))
        return hashlib.sha256(repr(content).encode()).hexdigest()

    def fit_prompt(
        self, messages: Sequence[Message], limit: int, policy: Literal["truncate", "drop", "error"]
    ) -> tuple[Sequence[Message], tuple[int, ...]] | None:
        """A prompt of at most `limit` tokens: (messages, ids), the messages given where nothing is cut; None where it
        must be dropped.

        "truncate" removes tokens from the end of the last user text and keeps all else: earlier turns, system prompt,
        assistant header. A prompt that nothing of that text fits into is dropped. "error" raises UserError.
        """
        ids = self.prompt_ids(messages)
        if len(ids) <= limit:
            return messages, ids
        if policy == "error":
            raise UserError(
                f"the prompt has {len(ids)} tokens, data.max_prompt_tokens allows {limit}: raise it, or set "
                'data.long_prompt to "truncate" or "drop"'
            )
        return None if policy == "drop" else self._truncated(messages, limit)

    def _truncated(
        self, messages: Sequence[Message], limit: int
    ) -> tuple[list[dict[str, str]], tuple[int, ...]] | None:
        turns = [dict(message) for message in messages]
        last = max(i for i, turn in enumerate(turns) if turn["role"] == "user")
        text = turns[last]["content"]
        spans = self._tokenize(text, return_offsets_mapping=True)["offset_mapping"]
        kept = len(spans)
        # The end of the text may merge with what follows it, so one subtraction is not always enough.
        while (excess := len(ids := self.prompt_ids(turns)) - limit) > 0:
            kept = max(0, kept - excess)
            turns[last]["content"] = text[: spans[kept - 1][1]] if kept else ""
            if not turns[last]["content"].strip():
                return None
        return turns, ids

    def response_ids(self, text: str, *, finished: bool, limit: int | None = None) -> tuple[int, ...]:
        """The ids of a response, its end marker included where it is finished; the first `limit` of them.

        Names of special tokens inside the text stay text. Equal text gives equal ids, whoever wrote it. None for a text
        of nothing that has not ended.
        """
        return self.responses_ids([text], [finished])[0][:limit]

    def responses_ids(self, texts: Sequence[str], finished: Sequence[bool]) -> list[tuple[int, ...]]:
        """response_ids() of many responses by one call of the tokenizer."""
        if not texts:
            return []
        whole = [text + self._gap if ended else text for text, ended in zip(texts, finished, strict=True)]
        encoded = self._tokenize(whole, split_special_tokens=True)["input_ids"]
        if self._anchor:
            anchor = self._encode(self._anchor, split_special_tokens=True)
            behind = self._tokenize([self._anchor + text for text in whole], split_special_tokens=True)["input_ids"]
            # A text that merges with what stands before it is taken alone.
            encoded = [
                b[len(anchor) :] if tuple(b[: len(anchor)]) == anchor else ids
                for ids, b in zip(encoded, behind, strict=True)
            ]
        return [(*ids, self.end_id) if ended else tuple(ids) for ids, ended in zip(encoded, finished, strict=True)]

    def text_of(self, token_ids: Sequence[int]) -> tuple[str, bool]:
        """(text, finished) of a response: the text without its end marker, other special tokens visible."""
        finished = bool(token_ids) and token_ids[-1] == self.end_id
        ids = list(token_ids[:-1] if finished else token_ids)
        text = self._decode(ids)
        if self._anchor:
            # Alone, the first token may lose the space that it begins with.
            anchor = list(self._encode(self._anchor, split_special_tokens=True))
            before, behind = self._decode(anchor), self._decode(anchor + ids)
            text = behind.removeprefix(before) if behind.startswith(before) else text
        return text.removesuffix(self._gap) if finished else text, finished

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _render(self, messages: Sequence[Message], *, header: bool) -> str:
        return render(self.tokenizer, self.conversation(messages), header=header)

    def _encode(self, text: str, *, split_special_tokens: bool = False) -> tuple[int, ...]:
        return tuple(self._tokenize(text, split_special_tokens=split_special_tokens)["input_ids"])

    def _tokenize(
        self, text: str | list[str], *, split_special_tokens: bool = False, return_offsets_mapping: bool = False
    ) -> Any:
        # transformers keeps split_special_tokens in the shared backend between setting and using it.
        with self._lock:
            return self.tokenizer(
                text,
                add_special_tokens=False,
                split_special_tokens=split_special_tokens,
                return_offsets_mapping=return_offsets_mapping,
                verbose=False,
            )

    def _check_vocabulary(self) -> None:
        """Tokens that text can be made of; special ones that are in a prompt are looked at there."""
        limit = self._vocabulary
        if limit is None:
            return
        of_text = {i: t.content for i, t in self.tokenizer.added_tokens_decoder.items() if not t.special}
        base = self.tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
        highest, token = max([(i, t) for i, t in of_text.items()] + [(i, t) for t, i in base.items()], default=(0, ""))
        if highest >= limit:
            raise UserError(
                f"the tokenizer of {self._name} has a token of id {highest} ({token!r}), the model embeddings for "
                f"{limit} tokens: they do not belong together"
            )

    def _find_end(self) -> int:
        text = self._render([*_PROBE, {"role": "assistant", "content": _SENTINEL}], header=False)
        if self._system_prompt is not None and self._system_prompt.strip() not in text:
            raise UserError(f"the chat template of {self._name} leaves out system messages: unset data.system_prompt")
        _, found, tail = text.rpartition(_SENTINEL)
        special = set(self.tokenizer.all_special_ids)
        special |= {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        marker = tail.lstrip()
        for gap in dict.fromkeys(("", tail[: len(tail) - len(marker)])):
            ids = self._encode(tail.removeprefix(gap))
            if found and ids and ids[0] in special:
                self._gap = gap
                return ids[0]
        raise UserError(
            f"the chat template of {self._name} puts {tail[:20]!r} after an assistant turn, which does not begin "
            "with a special token: a finished response could not be told from a cut one; make it end in one, in the "
            "chat_template.jinja of the model's directory"
        )

    def _find_header(self) -> None:
        """Prompt ids and response ids, put together, must be what the template gives for the whole conversation.

        Where they are not, a prompt gets the header that an assistant's last turn has (an empty think block, as Qwen
        3's, or a channel), and a response the first token that it has behind that header.
        """
        if self._fits() or self._fits_behind_an_anchor():
            return
        ends = {self._ends_of_header(conversation) for conversation in _CONVERSATIONS}
        wrong, right = next(iter(ends)) if len(ends) == 1 else ("", "")
        before = self.tokenizer.chat_template
        whole = [self._render(self._answered(c), header=False) for c in _CONVERSATIONS]
        if wrong or right:
            set_header(self.tokenizer, wrong, right)
            same = whole == [self._render(self._answered(c), header=False) for c in _CONVERSATIONS]
            if same and (self._fits() or self._fits_behind_an_anchor()):
                self.notes.append(
                    f"the chat template of {self._name} ends the header of an assistant's turn in {right!r} and that "
                    f"of a prompt in {wrong!r}: prompts end in {right!r}, and so does the template that is saved with "
                    "the student; data.template_arguments chooses another form where the template has one"
                )
                return
            self.tokenizer.chat_template = before
        prompt = self._render(_PROBE, header=True)
        raise UserError(
            f"the chat template of {self._name} writes an assistant turn as {whole[0][-60:]!r} but the prompt for one "
            f"as {prompt[-40:]!r}, or its tokens merge there: responses would differ from what the model was taught; "
            "give data.template_arguments that make them equal, or change the chat_template.jinja of the model's "
            "directory"
        )

    @staticmethod
    def _answered(conversation: Sequence[Message]) -> list[Message]:
        return [*conversation, {"role": "assistant", "content": _SENTINEL}]

    def _fits(self) -> bool:
        text = self._render(self._answered(_PROBE), header=False)
        joined = self.prompt_ids(_PROBE) + self.response_ids(_SENTINEL, finished=True)
        return self._encode(text)[: len(joined)] == joined

    def _fits_behind_an_anchor(self) -> bool:
        header = self._render(_PROBE, header=True)
        # Not a special token's name: a response is encoded as plain text.
        for length in (1, 4):
            self._anchor = header[-length:]
            if self._fits():
                return True
        self._anchor = ""
        return False

    def _ends_of_header(self, conversation: Sequence[Message]) -> tuple[str, str]:
        """(how the header of a prompt ends, how that of the turn does) behind what both have in common; ("", "") where
        they differ before the header."""
        turn, found, _ = self._render(self._answered(conversation), header=False).rpartition(_SENTINEL)
        prompt = self._render(conversation, header=True)
        wrong, right = difference(prompt, turn)
        bare = self._render(conversation, header=False)
        return (wrong, right) if found and len(prompt) - len(wrong) >= len(bare) else ("", "")
