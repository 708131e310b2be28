"""The chat template of one tokenizer: prompts, responses and the end marker, in token ids.

The teacher's text and a finished sample of the student must be the same kind of sequence, or the discriminator learns
to tell them by their end marker instead of their words. So a response is always: the ids of its text, then, where it
ended by itself, the marker that the chat template puts after an assistant turn.
"""

from __future__ import annotations

import datetime
import hashlib
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jinja2 import TemplateError

from gadcore.errors import UserError

Message = Mapping[str, str]

_PROBE = [{"role": "user", "content": "Hello"}]
_SENTINEL = "Sentinel answer"
# Some templates (Llama 3.2) write today's date into the prompt. Runs must not depend on the day, so every template
# sees the day that Llama 3's templates use when they know no clock.
_DAY = datetime.datetime(2024, 7, 26)


class ChatTemplate:
    """Renders conversations and responses for one fast tokenizer from transformers.

    system_prompt: put before conversations that have no system message; None leaves them to the template, which may
      add its model's own.

    tokenizer: the one given.
    end_id: the end marker, a special token: found by rendering an assistant turn and looking at what follows its text.

    Raises UserError for a tokenizer without a chat template, without an end marker, or whose template renders an
    assistant turn otherwise than as prompt, text, end marker.
    """

    def __init__(self, tokenizer: Any, *, system_prompt: str | None = None) -> None:
        self.tokenizer = tokenizer
        self._system_prompt = system_prompt
        self._lock = threading.Lock()
        self._name = tokenizer.name_or_path or type(tokenizer).__name__
        if not tokenizer.is_fast:
            raise UserError(f"the tokenizer of {self._name} has no tokenizer.json: convert it to a fast tokenizer")
        if not tokenizer.chat_template:
            raise UserError(
                f"the tokenizer of {self._name} has no chat template: use an instruction-tuned model, or add a "
                "chat_template.jinja to its directory"
            )
        self.end_id = self._find_end()
        ends = {self.end_text, tokenizer.eos_token}
        self._end_texts = tuple(sorted(end for end in ends if end))
        self._check_turn()

    def conversation(self, messages: Sequence[Message]) -> list[dict[str, str]]:
        """The messages with the system prompt in front, where one is set and the messages have none."""
        turns = [dict(message) for message in messages]
        if self._system_prompt is None or any(turn["role"] == "system" for turn in turns):
            return turns
        return [{"role": "system", "content": self._system_prompt}, *turns]

    def prompt_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """A conversation up to and including the header of the assistant's turn."""
        return self._encode(self._render(messages, header=True))

    def rendered(self, messages: Sequence[Message]) -> str:
        """The text of a conversation up to and including the header of the assistant's turn."""
        return self._render(messages, header=True)

    def encode_all(self, rendered: Sequence[str]) -> list[tuple[int, ...]]:
        """prompt_ids() of many rendered prompts by one call of the tokenizer."""
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

        Names of special tokens inside the text stay text. Equal text gives equal ids, whoever wrote it.
        """
        ids = self._encode(text, split_special_tokens=True)
        return (ids + (self.end_id,) if finished else ids)[:limit]

    def responses_ids(self, texts: Sequence[str], finished: Sequence[bool]) -> list[tuple[int, ...]]:
        """response_ids() of many responses by one call of the tokenizer."""
        if not texts:
            return []
        encoded = self._tokenize(list(texts), split_special_tokens=True)["input_ids"]
        return [(*ids, self.end_id) if ended else tuple(ids) for ids, ended in zip(encoded, finished, strict=True)]

    def text_of(self, token_ids: Sequence[int]) -> tuple[str, bool]:
        """(text, finished) of a response: the text without its end marker, other special tokens visible."""
        finished = bool(token_ids) and token_ids[-1] == self.end_id
        ids = list(token_ids[:-1] if finished else token_ids)
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text), finished

    def _render(self, messages: Sequence[Message], *, header: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                self.conversation(messages), add_generation_prompt=header, tokenize=False, strftime_now=_DAY.strftime
            )
        except TemplateError as error:
            raise UserError(f"the chat template of {self._name} refuses the conversation: {error}") from None
        return str(text)

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

    def _find_end(self) -> int:
        turns = [*_PROBE, {"role": "assistant", "content": _SENTINEL}]
        text = self._render(turns, header=False)
        if self._system_prompt is not None and self._system_prompt.strip() not in text:
            raise UserError(f"the chat template of {self._name} leaves out system messages: unset data.system_prompt")
        _, found, tail = text.rpartition(_SENTINEL)
        ids = self._encode(tail)
        special = set(self.tokenizer.all_special_ids)
        special |= {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        if not found or not ids or ids[0] not in special:
            raise UserError(
                f"the chat template of {self._name} puts {tail[:20]!r} after an assistant turn, which does not begin "
                "with a special token: a finished response could not be told from a cut one"
            )
        return ids[0]

    def _check_turn(self) -> None:
        """Prompt ids and response ids, put together, must be what the template gives for the whole conversation."""
        text = self._render([*_PROBE, {"role": "assistant", "content": _SENTINEL}], header=False)
        joined = self.prompt_ids(_PROBE) + self.response_ids(_SENTINEL, finished=True)
        if self._encode(text)[: len(joined)] != joined:
            prompt = self._render(_PROBE, header=True)
            raise UserError(
                f"the chat template of {self._name} writes an assistant turn as {text[-60:]!r} but the prompt for one "
                f"as {prompt[-40:]!r}, or its tokens merge there: responses would differ from what the model was taught"
            )
