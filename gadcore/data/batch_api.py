"""OpenAI's batch files: requests in one file, replies in another, joined by their custom_id.

A reply holds no prompt, so both files have to be in the directory (or both kinds of lines in the file) that is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from gadcore.data.records import Broken, Record


def joined(records: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The records, as they come, and behind them a row for every reply of a batch, in the order of the replies.

    A request or a reply without its other half, and a reply that is no whole answer, is a Broken.
    """
    requests: dict[str, tuple[str, Mapping[str, Any] | None]] = {}
    replies: list[tuple[str, str, Any]] = []
    for where, record in records:
        key = record.get("custom_id") if isinstance(record, Mapping) else None
        if not isinstance(key, str) or not ("body" in record or "response" in record):
            yield where, record
        elif "body" in record:
            if key in requests:
                yield where, Broken(f"the request {key!r} is there twice: keep one")
            requests[key] = where, record["body"]
        else:
            replies.append((where, key, record))
    answered: set[str] = set()
    for where, key, record in replies:
        if key in answered:
            yield where, Broken(f"the reply to {key!r} is there twice: keep one")
            continue
        answered.add(key)
        yield where, _row(key, requests, record)
    for key, (where, _) in requests.items():
        if key not in answered:
            yield (
                where,
                Broken("this request of a batch has no reply: put the batch's output file into the same directory"),
            )


def _row(key: str, requests: Mapping[str, tuple[str, Any]], record: Mapping[str, Any]) -> Any:
    if key not in requests:
        return Broken(
            "this reply of a batch has no prompt: put the batch's input file into the same directory and "
            "give that directory"
        )
    body = requests[key][1]
    messages = body.get("messages") if isinstance(body, Mapping) else None
    if not isinstance(messages, list):
        return Broken("the request of this reply has no messages: only chat completions can be read")
    response = record["response"]
    if record.get("error") or not isinstance(response, Mapping) or response.get("status_code", 200) != 200:
        return Broken("the request of this reply failed: remove the reply")
    answer = response.get("body")
    choices = answer.get("choices") if isinstance(answer, Mapping) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
        return Broken("this reply of a batch has no choices: only chat completions can be read")
    if len(choices) > 1:
        return Broken(f"this reply of a batch has {len(choices)} choices: keep one")
    if choices[0].get("finish_reason") == "length":
        return Broken("this reply of a batch was cut by max_tokens: remove it, or ask again with more")
    row = {"messages": messages, "completion": [choices[0].get("message")]}
    return Record(row.items(), tuple(row))
