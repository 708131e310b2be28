"""What README and guides say: every command and every program in them is run, with small settings, and every setting,
command and file that they name exists. A command without a rule here fails.
"""

from __future__ import annotations

import glob
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from gadcore.config import loading
from gadcore.config.command_line import setting_kinds
from gadcore.config.settings import Config
from gadcore.evaluate.human_command import SheetConfig
from gadcore.evaluate.judge_command import CompareConfig, JudgeConfig
from gadcore.evaluate.settings import EvalConfig
from gadcore.integrations.client import DEFAULT_URL
from gadcore.integrations.service.settings import ServiceConfig
from gadcore.plan.settings import PlanConfig
from gadcore.run import COMMANDS
from gadcore.teacher.settings import CollectConfig
from gadcore.train.progress import BASELINES
from tests.support.openai_server import Handler, completion, serve
from tests.support.runs import ANSWERS, PROMPTS, ROOT, run, tiny_arguments, write_rows
from tests.support.service import running, settings

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs/guide").glob("*.md"))]
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
MODEL = "smollm2-135m-instruct"

# Not run, only looked up: a target of the Makefile, or a suite of bench and its options. Why, by the command.
LOOKED_UP = {
    "make run": "the whole default job: tests/e2e runs it",
    "make test": "these tests are part of it",
    "make lint": ".ci/run runs it",
    "make test-rehearsal": "part of make test",
    "make test-without-native": ".ci/run runs it",
    "make doctor": "`python -m gadcore.run doctor`, which is run",
    "make gpu-test": "needs a GPU",
    "make gpu-bench": "needs a GPU; tests/unit/bench/gpu rehearses it",
    "python -m bench gpu": "tests/unit/bench/gpu runs it",
    "python -m bench paper": "trains for minutes an arm: tests/runs/test_paper_gates.py runs its parts",
}
# Documents whose Python is run by another test: pieces of sources, no programs.
RUN_BY = {"add-an-op.md": "tests/kernels/test_add_an_op.py"}

# What makes a command small, beside what it says itself.
TRAINING = {
    "schedule.sft_steps": 2, "schedule.warmup_steps": 2, "schedule.gad_steps": 2,
    "schedule.seqkd_steps": 2, "schedule.soda_steps": 2,
    "gate.rows": 4, "gate.extra_steps": 1, "gate.every": 1, "gate.when_closed": "go_on",
    "convergence.rows": 4, "convergence.steps": 1, "convergence.step_rows": 2, "convergence.every": 2,
    "tracking.monitor_interval": 0,
}  # fmt: skip
EVALUATION = {
    "sampling.engine": "hf", "eval.rows": 4, "data.max_prompt_tokens": 96, "data.max_response_tokens": 6,
    "eval.resamples": 50, "fresh.steps": 2, "fresh.batch_size": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Code:
    """A command, or a program whose first line names its file. where: document:line."""

    where: str
    text: str
    program: bool = False

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text, comments=True)

    @property
    def name(self) -> str:
        """`make TARGET ..` or `python -m MODULE COMMAND`, without settings and comments."""
        words = ["python" if word.endswith("/python") else word for word in self.words]
        return " ".join(words if words[0] == "make" else words[:4])


def blocks(path: Path) -> Iterator[tuple[int, str, list[str]]]:
    """(number of the first line, language, lines) of everything fenced or indented by four spaces."""
    number, language, lines = 0, None, []
    for i, line in enumerate([*path.read_text(encoding="utf-8").splitlines(), ""], 1):
        fence = re.match(r"\s*```(\w*)", line)
        if fence and language is None:
            number, language, lines = i + 1, fence[1], []
        elif fence:
            yield number, language or "", lines
            language, lines = None, []
        elif language is not None:
            lines.append(line)
        elif line.startswith("    "):
            number = number if lines else i
            lines.append(line[4:])
        elif lines:
            yield number, "", lines
            lines = []
    assert language is None, f"{path}: a fence is not closed"


def code_of(path: Path) -> list[Code]:
    found = []
    for number, language, lines in blocks(path):
        where = f"{path.relative_to(ROOT)}:{number}"
        if language == "python":
            if path.name not in RUN_BY:
                found.append(Code(where, "\n".join(lines) + "\n", program=True))
            continue
        for text in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
            if re.match(r"(\$ )?(\w+=\S+ )*(make|(\S+/)?python3?) ", text):
                found.append(Code(where, text.removeprefix("$ ")))
    return found


class Worker:
    """A process that runs command lines and programs one after the other: torch is imported once."""

    SCRIPT = """
import contextlib, io, json, os, runpy, sys, traceback
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
from gadcore.run import main
for line in sys.stdin:
    folder, argv, said = *json.loads(line), io.StringIO()
    os.chdir(folder)
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            if argv and argv[0].endswith(".py"):
                runpy.run_path(argv[0], run_name="__main__")
                code = 0
            else:
                code = main(argv)
        except SystemExit as leaving:
            code = leaving.code or 0
        except BaseException:
            code = traceback.format_exc()
    print(json.dumps([code, said.getvalue()]), file=answers, flush=True)
"""

    def __init__(self) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.SCRIPT], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, folder: Path, argv: list[str]) -> tuple[int | str, str]:
        """(exit code, or the traceback; what was printed)."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps([str(folder), argv]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"{shlex.join(argv)} ended its process"
        code, said = json.loads(line)
        return code, said

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(60)


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.end()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a teacher that is also a judge, of ratings and of wins."""

    def behave(prompt: str, attempt: int) -> Callable[[Handler], None] | None:
        verdict = "7 5" if "Rate each answer" in prompt else "A"
        return (lambda handler: handler.reply(200, completion(verdict))) if "<answer A>" in prompt else None

    with serve(behave) as running:
        yield running.base_url


@pytest.fixture(scope="module")
def discriminator_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a discriminator service over a tiny model and rows."""
    pytest.importorskip("fastapi")
    with running(settings(tmp_path_factory.mktemp("service"))) as (url, _):
        yield url


@pytest.fixture(scope="module")
def prepared(worker: Worker, module_folder: Path) -> Path:
    """A folder with what the guides' commands read, in which a tiny run has finished: runs/gad, the latest one."""
    folder = module_folder
    small = tiny_arguments(folder)
    for name in ("answers", "held_out", "test", "vicuna"):
        write_rows(folder / f"{name}.jsonl")
    pairs = zip(PROMPTS, ANSWERS, strict=True)
    rows = [{"question": prompt, "answer": answer} for prompt, answer in pairs]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    (folder / "mine.toml").write_text("[schedule]\nbatch_size = 3\n")
    code, said = worker(folder, [*small, "--run.dir", "runs/gad"])
    assert code == 0, f"{code}\n{said}"
    shutil.copytree(folder / "runs/gad", folder / "runs/seqkd")
    return folder


def with_small(argv: list[str], small: dict[str, object]) -> list[str]:
    """The settings of `small` that the command does not give itself, and the command's own."""
    given = {word.partition("=")[0] for word in argv if word.startswith("--")}
    return [part for key, value in small.items() if f"--{key}" not in given for part in (f"--{key}", str(value))] + argv


def small_training(argv: list[str], folder: Path) -> list[str]:
    """A training run's settings with the tiny model in place of its preset's; its own are checked as they stand."""
    if "--resume" in argv or "--help" in argv:
        return argv
    loading.load([word for word in argv if word not in ("--dry-run", *BASELINES)])
    tiny = tiny_arguments(folder)[2:]
    settings = dict(zip([key[2:] for key in tiny[::2]], tiny[1::2], strict=True)) | TRAINING
    if "--data.train" in argv:
        del settings["data.eval"]  # rows of one's own are split
    if "--preset" in argv:
        at = argv.index("--preset")
        argv = [*argv[:at], *argv[at + 2 :]]
    if "--run.dir" in argv:
        shutil.rmtree(folder / argv[argv.index("--run.dir") + 1], ignore_errors=True)
    command = [word for word in argv[:1] if word in BASELINES]
    return command + with_small(argv[len(command) :], settings)


def small_command(code: Code, folder: Path, server: str) -> list[str]:
    """The arguments of gadcore.run, made small."""
    argv = [word.replace(MODEL, str(folder / "model")) for word in code.words[3:]]
    command = argv[0] if argv and not argv[0].startswith("-") else "train"
    asking = {"endpoint.base_url": server, "endpoint.concurrency": 2}
    if command in ("train", *BASELINES):
        return small_training(argv, folder)
    if command == "eval":
        return [command, *with_small(argv[1:], EVALUATION)]
    if command in ("judge", "compare", "collect"):
        return [command, *with_small(argv[1:], asking)]
    if command == "data":
        return [command, *with_small(argv[1:], {"student.model": folder / "model", "data.max_prompt_tokens": 96,
                                                "data.max_response_tokens": 24})]  # fmt: skip
    if command == "plan":
        return [command, *with_small(argv[1:], {"plan.check_activations": "false"})]
    if command == "tally":
        rate(folder / "sheet")
        return [command, *(path for word in argv[1:] for path in sorted(glob.glob(word, root_dir=folder)))]
    assert command in ("doctor", "doctor-d", "export", "report", "sheet"), (
        f"{code.where}: give the command {command} a rule in this test"
    )
    return argv


def rate(sheet: Path) -> None:
    """A rater's export, who finds all pairs equal."""
    key = json.loads((sheet / "key.json").read_text())
    answers = [{"pair": pair, "choice": "tie", "seconds": 1.0} for pair in key["pairs"]]
    export = {"sheet": key["sheet"], "rater": "Ada", "pairs": len(answers), "answers": answers}
    (sheet.parent / "answers-1-Ada.json").write_text(json.dumps(export))


def look_up(code: Code) -> None:
    """The target, or the suite and its options, exist."""
    name = next((name for name in LOOKED_UP if code.name == name or code.name.startswith(f"{name} ARGS=")), None)
    assert name is not None, f"{code.where}: `{code.name}` has no rule: run it, or say in LOOKED_UP why not"
    if code.words[0] == "make":
        done = run(["-n", *code.words[1:]], ROOT, command=["make"])
    else:
        done = run([*code.words[3:], "--help"], ROOT, command=[sys.executable, "-m", "bench"])
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_commands_and_programs(
    document: Path,
    worker: Worker,
    prepared: Path,
    server: str,
    tmp_path: Path,
    monkeypatch,
    request: pytest.FixtureRequest,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(prepared, tmp_path, symlinks=True, dirs_exist_ok=True)
    for code in code_of(document):
        if code.program:
            name = re.match(r"# (\w+\.py)\n", code.text)
            assert name, f"{code.where}: the first line of a program names its file: # NAME.py"
            text = code.text.replace(MODEL, str(tmp_path / "model"))
            if DEFAULT_URL in text:
                text = text.replace(DEFAULT_URL, request.getfixturevalue("discriminator_service"))
            (tmp_path / name[1]).write_text(text)
            argv = [name[1]]
        elif code.words[3:4] == ["serve-discriminator"]:
            # It returns as it is stopped: discriminator_service has started another one.
            loading.load(code.words[4:], ServiceConfig)
            continue
        elif code.words[1:3] == ["-m", "gadcore.run"]:
            argv = small_command(code, tmp_path, server)
        else:
            look_up(code)
            continue
        exit_code, said = worker(tmp_path, argv)
        # doctor-d says by 1 that it found something, as it does of random models.
        fine = (0, 1) if argv[:1] == ["doctor-d"] else (0,)
        assert exit_code in fine, f"{code.where}: {code.text}\nas {shlex.join(argv)}\n{exit_code}\n{said}"


def test_the_documents_have_what_is_tested() -> None:
    """A change of markup that hides commands from this test is seen."""
    found = [code for path in DOCUMENTS for code in code_of(path)]
    assert {"make run", "make test"} <= {code.name for code in code_of(DOCUMENTS[0])}
    told = {code.words[3] for code in found if not code.program and len(code.words) > 3}
    # These take a terminal, or the process's place: the first page names them in its text.
    named = {name for name in ("chat", "serve") if f"gadcore {name}`" in DOCUMENTS[0].read_text(encoding="utf-8")}
    assert {*COMMANDS} - {"train"} <= told | named, "a command that no guide shows"
    assert sum(code.program for code in found) >= 5
    assert {code.name.partition(" ARGS=")[0] for code in found if not code.program} >= LOOKED_UP.keys()


def anchors(path: Path) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_what_is_named_exists(document: Path) -> None:
    """Links, settings, commands of gadcore.run, targets of make and suites of bench."""
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", text):
        target = document.parent / link if link else document
        assert "://" in link or target.exists(), f"{document.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{document.name} links to {link}#{anchor}"
    models = (Config, EvalConfig, CollectConfig, PlanConfig, JudgeConfig, CompareConfig, SheetConfig, ServiceConfig)
    settings = {key for model in models for key in setting_kinds(model)}
    assert set(re.findall(r"--([a-z_]+\.[a-z_0-9]+)", text)) <= settings | {"section.key"}
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make ([a-z-]+)", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"
    for command in re.findall(r"`python -m gadcore\.run ([a-z]+)", text):
        assert command in COMMANDS


def test_the_first_page_stays_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8")) < 5500
