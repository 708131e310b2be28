"""Settings, prompts, keys, limits and rows of `collect`; the server and its faults are in tests/faults."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from rich.console import Console

from gadcore.config.loading import dump, load
from gadcore.data.rows import load_rows
from gadcore.errors import UserError
from gadcore.teacher.client import Tally
from gadcore.teacher.command import main
from gadcore.teacher.limits import MinuteLimit, Purse, cost, most
from gadcore.teacher.progress import progress
from gadcore.teacher.prompts import read_prompts
from gadcore.teacher.reply import Reply, Unusable
from gadcore.teacher.settings import Budget, CollectConfig, Endpoint, PromptSettings
from gadcore.teacher.store import ChatRequest, ReplyStore, Spent
from tests.support.collecting import arguments, prompts_file, rows
from tests.support.openai_server import answer_to, completion, serve

USER = {"role": "user", "content": "Hello"}
ASSISTANT = {"role": "assistant", "content": "Hi."}
SYSTEM = {"role": "system", "content": "Be brief."}


def error_of(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        load(argv, CollectConfig)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_settings_of_a_command_start_from_its_defaults_and_survive_a_dump(tmp_path: Path) -> None:
    assert load([], CollectConfig) == CollectConfig()
    argv = ["--endpoint.model", "m", "--sampling.extra", '{reasoning_effort = "low", top_k = 5}', "--budget.money=none"]
    config = load(argv, CollectConfig)
    assert config.sampling.parameters() == {"max_completion_tokens": 1536, "reasoning_effort": "low", "top_k": 5}
    (tmp_path / "c.toml").write_text(dump(config))
    assert load(["--config", str(tmp_path / "c.toml")], CollectConfig) == config


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--preset", "smollm2-cpu"], "--preset smollm2-cpu is for training runs"),
        (["--endpoint.modle", "m"], "unknown setting endpoint.modle (command line); did you mean endpoint.model?"),
        (["--data.train", "x"], "unknown setting data.train"),
        (["--endpoint", "x"], "endpoint (command line) is a group of settings"),
        (["--endpoint.base_url", "localhost:8000"], "endpoint.base_url must be an address"),
        (["--endpoint.base_url", "http://host:99999/v1"], "endpoint.base_url must be an address"),
        (["--endpoint.concurrency", "0"], "endpoint.concurrency = 0 (command line) must be greater than 0"),
        (["--budget.money", "3"], "budget.money needs endpoint.price_input and endpoint.price_output"),
        (["--sampling.extra", "{stream = true}"], "sampling.extra cannot set stream"),
        (["--sampling.extra", "{temperature = 1}"], "sampling.extra cannot set temperature: it has a setting"),
    ],
)
def test_wrong_settings(argv: list[str], text: str) -> None:
    assert error_of(*argv).startswith(text)


@pytest.mark.parametrize(
    "argv",
    [
        ["--endpoint.api_key_variable", "sk-SECRET"],
        ["--endpoint.api_key_variable", "AIzaSECRETx"],
        ["--endpoint.base_url", "https://u:SECRET@host/v1"],
        ["--endpoint.base_url", "https://host/v1?key=SECRET"],
    ],
)
def test_a_key_in_the_settings_is_refused_and_not_repeated(argv: list[str]) -> None:
    assert "SECRET" not in error_of(*argv)


def test_help_names_the_command_and_needs_nothing(capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        load(["--help"], CollectConfig)
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "usage: gadcore collect" in out and "--endpoint.price_input" in out


def test_settings_import_neither_torch_nor_the_client() -> None:
    code = "import sys, gadcore.teacher.settings; sys.exit(bool({'torch', 'httpx2'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_plain_text_is_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffOne?\r\n\n  Two \u2028 lines?\nDrei für ü".encode())
    found = read_prompts(PromptSettings(source=str(path)))
    assert [p.messages[0]["content"] for p in found] == ["One?", "Two \u2028 lines?", "Drei für ü"]
    assert [p.source for p in found] == [f"{path}:1", f"{path}:3", f"{path}:4"]
    assert len(read_prompts(PromptSettings(source=str(path), rows=2))) == 2


ROWS = [
    ({"prompt": "Hello"}, [USER]),
    ({"prompt": "Hello", "teacher_response": "old", "source": "koala"}, [USER]),
    ({"prompt": [SYSTEM, USER], "completion": "old"}, [SYSTEM, USER]),
    ({"messages": [USER, ASSISTANT, USER]}, [USER, ASSISTANT, USER]),
    ({"messages": [SYSTEM, USER, ASSISTANT]}, [SYSTEM, USER]),
    ({"content": [USER, ASSISTANT], "teacher_response": None}, [USER]),
]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "directory"])
def test_prompts_come_from_the_sources_of_training_data(kind: str, tmp_path: Path) -> None:
    for number, (row, messages) in enumerate(ROWS):
        path = tmp_path / f"{number}" / f"rows.{'jsonl' if kind == 'directory' else kind}"
        path.parent.mkdir()
        if kind == "parquet":
            pyarrow.parquet.write_table(pa.Table.from_pylist([row]), path)
        else:
            path.write_text(json.dumps(row) + "\n")
        (found,) = read_prompts(PromptSettings(source=str(path.parent if kind == "directory" else path)))
        assert list(found.messages) == messages
        assert found.source == ("koala" if "source" in row else f"{path}{'[0]' if kind == 'parquet' else ':1'}")


def test_columns_are_mapped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "Hello", "prompt": "no"}) + "\n")
    (found,) = read_prompts(PromptSettings(source=str(path), columns={"prompt": "question"}))
    assert found.messages == (USER,)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("none.txt", None, "the file of prompts {} does not exist"),
        ("blank.txt", b"\n \n", "{} has no prompts"),
        ("latin.txt", b"a\ncaf\xe9\n", "{}:2: not UTF-8"),
        ("a.jsonl", b'{"question": "x"}\n', "{}:1: no prompt"),
        ("b.jsonl", b'{"prompt": " "}\n', "{}:1: the last user turn is empty"),
        ("c.jsonl", b'{"messages": [{"role": "assistant", "content": "x"}]}\n', "{}:1: messages is an empty conv"),
        ("d.jsonl", b"3\n", "{}:1: expected an object"),
        ("e.xml", b"x\n", "{}: this kind of file cannot be read"),
    ],
)
def test_prompts_that_cannot_be_used(name: str, content: bytes | None, text: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_prompts(PromptSettings(source=str(path)))
    assert str(caught.value).startswith(text.format(path))


@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        (
            "p.jsonl",
            b'{"prompt": " "}\n3\n{"prompt": "good"}\n{"prompt": ""}\n{"prompt": "cut\n',
            [
                "{0}:1, {0}:4: the last user turn is empty: remove the row or fill it in",
                "{0}:2: expected an object with columns, found a number",
                "{0}:5: broken JSON: Unterminated string starting at (column 12)",
            ],
        ),
        (
            "p.txt",
            b"\xff\ngood\n\ncaf\xe9\n",
            ["{0}:1, {0}:4: not UTF-8: save the file as UTF-8"],
        ),
    ],
)
def test_all_prompts_that_cannot_be_used_are_told_at_once(
    name: str, content: bytes, lines: list[str], tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_prompts(PromptSettings(source=str(path)))
    first, *others = str(caught.value).split("\n")
    assert " cannot be used: mend them or take them out" in first and str(path) in first
    assert others == [f"  {line.format(path)}" for line in lines]
    # What is beyond the limit is not asked for.
    with pytest.raises(UserError, match=f"^{path}:1: "):
        read_prompts(PromptSettings(source=str(path), rows=1))


@pytest.mark.parametrize(
    ("usage", "spent"),
    [
        ({"prompt_tokens": 3, "completion_tokens": 100}, Spent(1, 3, 100)),
        ({"prompt_tokens": 3, "completion_tokens": 8}, Spent(1, 3, 8)),
        # No token holds so much text.
        ({"prompt_tokens": 0, "completion_tokens": 100}, Spent(1, 2 + 8, 100, 1)),
        ({"prompt_tokens": 3, "completion_tokens": 0}, Spent(1, 3, 334, 1)),
        ({"prompt_tokens": 0, "completion_tokens": 7}, Spent(1, 2 + 8, 334, 1)),
        ({"prompt_tokens": 3}, Spent(1, 3, 334, 1)),
        (None, Spent(1, 2 + 8, 334, 1)),
    ],
)
def test_a_count_that_cannot_be_is_estimated(usage: dict[str, int] | None, spent: Spent) -> None:
    assert Spent.of(ChatRequest((USER,), {}), usage, "x" * 1000) == spent


def test_no_text_may_have_no_tokens() -> None:
    assert Spent.of(ChatRequest((USER,), {}), {"prompt_tokens": 3, "completion_tokens": 0}) == Spent(1, 3, 0)


def test_what_must_be_given(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(UserError, match="no prompts are named: set prompts.source"):
        main([])
    prompts = prompts_file(tmp_path / "p.txt", 1)
    with pytest.raises(UserError, match=r"no model is named: set endpoint\.model"):
        main(["--prompts.source", str(prompts), "--output.dir", str(tmp_path / "out")])
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    argv = arguments(prompts, "https://api.openai.com/v1", tmp_path / "out")
    with pytest.raises(UserError, match="the environment variable OPENAI_API_KEY is not set"):
        main(argv)
    monkeypatch.setenv("OPENAI_API_KEY", "sk two")
    with pytest.raises(UserError, match="holds characters no key has") as caught:
        main(argv)
    assert "sk two" not in str(caught.value)


def test_a_key_is_of_messages_model_and_parameters_whatever_their_order() -> None:
    request = ChatRequest((USER,), {"temperature": 0.5, "seed": 1})
    key = request.key("m")
    assert key == ChatRequest([dict(reversed(USER.items()))], {"seed": 1, "temperature": 0.5}).key("m")
    others = [
        request.key("n"),
        ChatRequest((USER,), {"temperature": 0.5, "seed": 2}).key("m"),
        ChatRequest((SYSTEM, USER), request.parameters).key("m"),
    ]
    assert len({key, *others}) == 4
    # Written down: another key would have every stored reply asked and paid for again.
    assert ChatRequest((USER,), {"seed": 1}).key("m") == (
        "61ec47e6e34634aba815fbe6e1721ff45fa26b1299e198f243478e32d1c902df"
    )


@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        (completion("Yes."), "answered"),
        (completion("Yes", "length"), "cut"),
        (completion(None, "length"), "cut"),
        (completion(None, refusal="No."), "refused"),
        (completion("", "content_filter"), "refused"),
        (completion(" \n"), "empty"),
        (completion("Yes.", None), "other"),
        (completion("Yes.", "tool_calls"), "other"),
    ],
)
def test_outcomes(body: dict, outcome: str) -> None:
    assert Reply.parse(json.dumps(body).encode()).outcome == outcome


@pytest.mark.parametrize("body", [b"", b"\xff", b"[" * 10**6, b'{"choices": {}}', b'{"choices": [3]}', b'"x"'])
def test_bodies_without_an_answer(body: bytes) -> None:
    with pytest.raises(Unusable):
        Reply.parse(body)


def test_half_a_surrogate_pair_is_kept_and_not_trained_on() -> None:
    reply = Reply.parse(json.dumps(completion("A \ud83d")).encode())
    assert (reply.text, reply.outcome) == ("A \ufffd", "damaged")
    assert reply.told == ("the text holds half of a surrogate pair, which became U+FFFD: not trained on",)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_no_window_of_a_minute_holds_more_than_the_limit() -> None:
    clock, times = Clock(), []
    limit = MinuteLimit(7, clock)
    for step in range(60):
        clock.now += limit.delay()
        times.append(clock.now)
        limit.take()
        clock.now += 3.7 if step % 5 else 0.0
    assert all(later - first > 60 - 1e-6 for first, later in zip(times, times[7:], strict=False))
    assert times[-1] <= 60 * 60 / 7  # and no slower than it has to be


def test_tokens_of_a_minute_are_corrected_when_they_are_known() -> None:
    clock = Clock()
    limit = MinuteLimit(100, clock)
    first = limit.take(90)
    clock.now = 10
    assert limit.delay(20) == pytest.approx(50)
    first.amount = 30
    assert limit.delay(20) == 0
    assert limit.delay(500) == pytest.approx(50)  # more than the limit: alone in its minute
    assert MinuteLimit(None, clock).delay(10**9) == 0


def test_rate_limits_hold_back_a_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("gadcore.teacher.limits.WINDOW_S", 0.5)
    prompts = prompts_file(tmp_path / "p.txt", 6)
    for name, value in (("requests_per_minute", "2"), ("tokens_per_minute", "30")):
        with serve() as server:
            argv = arguments(prompts, server.base_url, tmp_path / name, f"--endpoint.{name}", value)
            assert main([*argv, "--sampling.max_tokens", "1"]) == 0
        # Two a window (10 + 5 tokens each, once they are counted): the third and the fifth begin a new one.
        assert server.times[5] - server.times[0] >= 0.9


def test_the_purse_counts_what_is_in_flight() -> None:
    endpoint = Endpoint(price_input=1.0, price_output=2.0)
    request = ChatRequest((USER,), {"max_completion_tokens": 50})
    limit = most(request)
    assert limit == Spent(1, 2 + 8, 50)
    purse = Purse(Budget(tokens=150), endpoint)
    assert purse.exceeded_by(limit, Spent()) is None
    purse.reserve(limit)
    assert purse.exceeded_by(limit, Spent()) is None
    assert purse.exceeded_by(limit, Spent(1, 31, 0)) == "budget.tokens = 150"
    purse.release(limit)
    assert purse.exceeded_by(limit, Spent(1, 31, 0)) is None
    assert cost(endpoint, Spent(1, 500_000, 250_000)) == pytest.approx(1.0)
    assert cost(Endpoint(price_input=1.0), Spent(1, 1, 1)) is None
    assert Purse(Budget(money=1e-4), endpoint).exceeded_by(limit, Spent()) == "budget.money = 0.0001"


def test_rows_are_training_data_in_the_order_of_the_prompts(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row, _ in ROWS))
    with serve(delay=0.01) as server:
        argv = arguments(source, server.base_url, tmp_path / "out", "--output.teacher", "T")
        assert main(argv) == 0
        assert len(server.seen) == 3  # the six rows hold three different conversations
        found = rows(tmp_path / "out/train.jsonl")
        assert [row.get("prompt") or row["messages"] for row in found] == [
            "Hello", [SYSTEM, USER], [USER, ASSISTANT, USER],
        ]  # fmt: skip
        assert {row["teacher"] for row in found} == {"T"}
        loaded = load_rows(str(tmp_path / "out/train.jsonl"), {})
        assert [row.teacher_response for row in loaded] == [answer_to("Hello")] * 3
        assert "6, 3 of them repeated" in (tmp_path / "out/README.md").read_text()


def test_a_system_prompt_is_asked_and_not_kept(tmp_path: Path) -> None:
    prompts = prompts_file(tmp_path / "p.txt", 1)
    with serve() as server:
        argv = arguments(prompts, server.base_url, tmp_path / "out", "--sampling.temperature", "0.5")
        assert main([*argv, "--prompts.system_prompt", "Be brief."]) == 0
    (body,) = server.bodies
    assert body["messages"] == [SYSTEM, {"role": "user", "content": "Question number 0?"}]
    assert (body["model"], body["temperature"], body["max_completion_tokens"]) == ("teacher", 0.5, 1536)
    assert rows(tmp_path / "out/train.jsonl")[0]["prompt"] == "Question number 0?"


def test_held_out_rows_stay_held_out_when_prompts_are_added(tmp_path: Path) -> None:
    share = ("--output.eval_share", "0.3")
    with serve() as server:
        held: list[set[str]] = []
        for count in (20, 60):
            prompts = prompts_file(tmp_path / "p.txt", count)
            assert main(arguments(prompts, server.base_url, tmp_path / "out", *share)) == 0
            parts = [{row["prompt"] for row in rows(tmp_path / f"out/{name}.jsonl")} for name in ("train", "eval")]
            assert not parts[0] & parts[1] and len(parts[0] | parts[1]) == count
            held.append(parts[1])
        assert held[0] < held[1] and 10 <= len(held[1]) <= 26
        assert main(arguments(prompts, server.base_url, tmp_path / "out")) == 0
        assert len(rows(tmp_path / "out/train.jsonl")) == 60 and not (tmp_path / "out/eval.jsonl").exists()
        assert len(server.seen) == 60


def test_the_data_card_says_what_was_collected(tmp_path: Path, capsys) -> None:
    prompts = prompts_file(tmp_path / "p.txt", 4)
    with serve() as server:
        prices = ("--endpoint.price_input", "2", "--endpoint.price_output", "8")
        assert main(arguments(prompts, server.base_url, tmp_path / "out", *prices)) == 0
        assert main(arguments(prompts, server.base_url, tmp_path / "out", "--sampling.seed", "1", *prices)) == 0
    card = (tmp_path / "out/README.md").read_text()
    for text in (
        "# Responses of teacher",
        "4 rows in train.jsonl; 0 prompts have no reply.",
        "| model as the server names it | teacher-2026 4 |",
        f"| endpoint | {server.base_url.split('/')[2]} |",
        '| parameters | `{"max_completion_tokens": 1536, "seed": 1}` |',
        "| answers paid for | 8 (unusable and earlier ones included), 80 prompt tokens, 40 response tokens |",
        "| cost | 0.0005 by the prices given |",
        "Finish reasons: stop 4.",
        "replies.jsonl also holds 4 replies to other prompts, parameters, models or addresses.",
        "terms of use of teacher",
    ):
        assert text in card, text
    assert "also holds 4 replies to other prompts" in capsys.readouterr().out


def test_a_terminal_shows_a_bar() -> None:
    file = io.StringIO()
    tally = Tally(8, 2, Spent(4, 10, 5), 0.25, answered=2, sent=3, failed={"k": "why"})
    with progress(Console(file=file, force_terminal=True, width=120), "judge") as watch:
        watch(tally)
    assert "judge" in file.getvalue() and "4/8" in file.getvalue()
    assert "15 tokens, cost 0.25, 1 failed, 3 requests sent" in file.getvalue()


def test_replies_are_read_back_from_the_file(tmp_path: Path) -> None:
    request, reply = ChatRequest((USER,), {}), Reply("a\nb \u2028 ü", "stop", None, {"prompt_tokens": 1}, "m", "i")
    path = tmp_path / "deep/er/replies.jsonl"
    with ReplyStore(path) as store:
        store.add(request, "m", reply, Spent(1, 2, 3), 0.5)
        store.add_failure(ChatRequest((USER,), {"seed": 1}), "m", "why", Spent(1, 1, 1))
        assert store.get(request.key("m")) == reply
    with ReplyStore(path) as store:
        assert store.get(request.key("m")) == reply and len(store) == 1 and store.repaired is None
        assert store.spent == Spent(2, 3, 4)
        assert store.get(request.key("n")) is None
