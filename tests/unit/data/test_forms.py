"""Forms of rows that people have: each gives the conversation that it means, or says why it gives none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gadcore.data.batch_api import joined
from gadcore.data.forms import RawRow, parse_row
from gadcore.data.rows import load_rows
from gadcore.errors import UserError

USER = {"role": "user", "content": "What is two plus two?"}
TEACHER = {"role": "assistant", "content": "Four."}
SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION = USER["content"]
CALL = [{"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}]


def turn(role: str, text: str) -> dict[str, str]:
    return {"from": role, "value": text}


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"conversations": [turn("human", QUESTION), turn("gpt", "Four.")]}, (USER,)),
        ({"conversations": [turn("system", "Be brief."), turn("user", QUESTION), turn("assistant", "Four.")]},
         (SYSTEM, USER)),
        ({"conversations": [turn("human", QUESTION), turn("gpt", "Four.")], "system": "Be brief."}, (SYSTEM, USER)),
        ({"conversations": json.dumps([USER, TEACHER])}, (USER,)),
        ({"instruction": QUESTION, "output": "Four."}, (USER,)),
        ({"instruction": QUESTION, "input": "", "output": "Four.", "system": ""}, (USER,)),
        ({"instruction": "What is", "input": "two plus two?", "output": "Four."},
         ({"role": "user", "content": "What is\n\ntwo plus two?"},)),
        ({"instruction": "Sure?", "output": "Four.", "history": [[QUESTION, "Four."]], "system": "Be brief."},
         (SYSTEM, USER, TEACHER, {"role": "user", "content": "Sure?"})),
        ({"instruction": QUESTION, "response": "Four."}, (USER,)),
        ({"prompt": QUESTION, "completion": "Four.", "system": "Be brief."}, (SYSTEM, USER)),
        ({"messages": [SYSTEM, USER, TEACHER], "system": "Be brief."}, (SYSTEM, USER)),
        ({"messages": [SYSTEM | {"role": "developer"}, USER, TEACHER]}, (SYSTEM, USER)),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "What is two"},
                                                    {"type": "text", "text": " plus two?"}]}, TEACHER]}, (USER,)),
        ({"messages": [USER, TEACHER | {"content": ["Fo", "ur."]}]}, (USER,)),
        ({"messages": [USER, TEACHER | {"tool_calls": None, "function_call": {}, "refusal": None}]}, (USER,)),
        ({"prompt": QUESTION, "teacher_response": [{"type": "output_text", "text": "Four."}]}, (USER,)),
        ({"prompt": QUESTION, "teacher_response": "Four.", "system": 3}, (USER,)),
        ({"prompt": QUESTION, "completion": "Four.", "custom_id": "a", "response": "x", "body": "y"}, (USER,)),
        ({"prompt": QUESTION, "teacher_response": "Four.", "history": "none", "output": 5, "input": []}, (USER,)),
    ],
)  # fmt: skip
def test_a_form_is_read(record: dict[str, Any], messages: tuple[dict[str, str], ...]) -> None:
    ((where, same),) = joined([("x:1", record)])
    assert parse_row(same, {}, where) == RawRow(messages, "Four.", "x:1")


@pytest.mark.parametrize(
    ("columns", "content"),
    [
        ({"prompt": "a+b", "completion": "d"}, "one\n\ntwo"),
        ({"prompt": "a+empty+b+null", "completion": "d"}, "one\n\ntwo"),
        ({"instruction": "a", "input": "b", "output": "d"}, "one\n\ntwo"),
        ({"prompt": "x+y", "response": "d"}, "literally"),
        ({"prompt": "a", "teacher_response": "d", "system": "none"}, "one"),
    ],
)
def test_columns_are_joined_renamed_and_left_out(columns: dict[str, str], content: str) -> None:
    record = {"a": "one", "b": "two", "empty": "", "null": None, "d": "Four.", "x+y": "literally"}
    record |= {"system": "a kernel"} if "system" in columns else {}
    row = parse_row(record, columns, "x:1")
    assert row == RawRow(({"role": "user", "content": content},), "Four.", "x:1")


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": CALL}, TEACHER]},
         "message 2 of messages calls a tool (get_weather), and gadcore trains on conversations of text alone"),
        ({"messages": [USER, TEACHER | {"tool_calls": CALL}]}, "message 2 of messages calls a tool (get_weather)"),
        ({"messages": [USER, TEACHER | {"function_call": {"name": "f"}}]}, "calls a tool (f)"),
        ({"messages": [USER, {"role": "tool", "content": "12"}, TEACHER]}, "message 2 of messages is a tool's turn"),
        ({"conversations": [turn("human", "x"), turn("observation", "12"), turn("gpt", "y")]}, "is a tool's turn"),
        ({"messages": [USER, {"role": "assistant", "content": None, "refusal": "No."}]}, "is a refusal and has no"),
        ({"messages": [USER | {"content": [{"type": "image_url", "image_url": {}}]}, TEACHER]},
         "part 1 of the content of message 1 of messages is no text (image_url)"),
        ({"messages": [USER | {"role": "narrator"}, TEACHER]}, "has the role 'narrator'"),
        ({"messages": [USER | {"role": None}, TEACHER]}, "has the role None"),
        ({"messages": [SYSTEM, USER, TEACHER], "system": "Be long."}, "and the column system another one"),
        ({"instruction": "x", "output": "y", "history": [["one"]]}, "item 1 of history must be a question and its"),
        ({"instruction": "x", "output": "y", "history": "earlier"}, "item 1 of history must be a question and its"),
        ({"instruction": "x", "input": 4, "output": "y"}, "input must be text, found a number"),
        ({"instruction": 3, "output": "y"}, "instruction must be text, found a number"),
        ({"instruction": "x"}, "no response: expected one of the columns teacher_response, completion, output, resp"),
        ({"question": "x", "answer": "y"}, "of them in the column map; the row has question, answer"),
        ({"conversations": "[{"}, "conversations is text that is no JSON list of messages"),
        ({"prompt": "x", "teacher_response": [{"type": "audio"}]}, "part 1 of the response (teacher_response) is no"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_of_text_is_told_by_name(record: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_row(record, {}, "x:1")
    assert str(caught.value).startswith("x:1: ") and text in str(caught.value)


def test_a_joined_column_must_be_there_and_text() -> None:
    with pytest.raises(UserError, match="there is no column 'c', which data.columns maps onto prompt"):
        parse_row({"a": "x", "d": "y"}, {"prompt": "a+c"}, "x:1")
    with pytest.raises(UserError, match="the column 'c', which is joined with others, must be text, found a number"):
        parse_row({"a": "x", "c": 4, "d": "y"}, {"prompt": "a+c", "completion": "d"}, "x:1")


def request(key: str, *messages: dict[str, str]) -> dict[str, Any]:
    body = {"model": "m", "messages": list(messages)}
    return {"custom_id": key, "method": "POST", "url": "/v1/chat/completions", "body": body}


def reply(key: str, *texts: str | None, reason: str = "stop", status: int = 200) -> dict[str, Any]:
    choices = [{"message": {"role": "assistant", "content": text}, "finish_reason": reason} for text in texts]
    response = {"status_code": status, "request_id": "r", "body": {"choices": choices}}
    return {"id": f"batch_{key}", "custom_id": key, "response": response, "error": None}


def test_a_batchs_requests_and_replies_become_rows(tmp_path: Path) -> None:
    lines = {
        "input.jsonl": [request("a", USER), request("b", SYSTEM, USER)],
        "output.jsonl": [reply("b", "4"), reply("a", "Four.")],
    }
    for name, records in lines.items():
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    output = tmp_path / "output.jsonl"
    assert load_rows(str(tmp_path), {}) == [
        RawRow((SYSTEM, USER), "4", f"{output}:1"),
        RawRow((USER,), "Four.", f"{output}:2"),
    ]
    with pytest.raises(UserError, match=r"2 of 2 rows [^\n]*\n[^\n]*:1, [^\n]*:2: this reply of a batch has no prompt"):
        load_rows(str(output), {})


@pytest.mark.parametrize(
    ("records", "text"),
    [
        ([request("a", USER)], "this request of a batch has no reply"),
        ([reply("a", "x")], "this reply of a batch has no prompt"),
        ([request("a", USER), reply("a", "x", status=429)], "the request of this reply failed"),
        ([request("a", USER), reply("a", "x", reason="length")], "this reply of a batch was cut by max_tokens"),
        ([request("a", USER), reply("a", "x", "y")], "has 2 choices: keep one"),
        ([request("a", USER), reply("a")], "has no choices"),
        ([request("a", USER), reply("a", None)], "the content of message 1 of completion must be text, found null"),
        ([request("a", USER), request("a", USER), reply("a", "x")], "the request 'a' is there twice"),
        ([request("a", USER), reply("a", "x"), reply("a", "y")], "the reply to 'a' is there twice"),
        ([{"custom_id": "a", "body": {"input": "x"}}, reply("a", "x")], "only chat completions can be read"),
        ([request("a", USER), {"custom_id": "a", "response": None, "error": {"code": "expired"}}], "failed"),
    ],
)
def test_a_batch_that_is_not_whole(records: list[dict[str, Any]], text: str) -> None:
    found = []
    for where, record in joined((f"x:{i}", record) for i, record in enumerate(records, 1)):
        try:
            parse_row(record, {}, where)
        except UserError as error:
            found.append(str(error))
    assert len(found) == 1 and text in found[0]
