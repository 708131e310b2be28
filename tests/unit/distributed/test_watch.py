"""Whatever ends one process of a job ends all, soon, and is told once."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import pytest

from tests.support.jobs import Job, start_job

HOW = ("kill", "hang", "raise", "told", "all", "SIGTERM", "none")
TIMEOUT = 4.0


@pytest.fixture(scope="module")
def ended(module_folder: Path) -> dict[str, tuple[Job, list[int | None], str]]:
    """How a process fails -> (the job, exit codes, what all have written), all jobs at the same time."""
    jobs = {
        how: start_job(2, ["-m", "tests.support.failing_job", how, str(TIMEOUT)], module_folder / how) for how in HOW
    }
    jobs["eval"] = start_job(2, ["-m", "gadcore.run", "eval"], module_folder / "eval")
    found = {}
    for how, job in jobs.items():
        codes = job.wait(90)
        found[how] = (job, codes, "".join(job.output(rank) for rank in range(2)))
    return found


def told(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("gadcore: ")]


def test_a_job_without_failure_ends_as_it_should(ended) -> None:
    _, codes, text = ended["none"]
    assert codes == [0, 0] and text.count("done\n") == 2 and told(text) == []


def test_a_killed_process_ends_the_others_who_say_where_they_were(ended) -> None:
    job, codes, text = ended["kill"]
    assert codes == [1, -signal.SIGKILL], text
    first, *places = told(job.output(0))
    assert first.startswith("gadcore: rank 0 has lost another one: ")
    assert re.fullmatch(r"gadcore: rank 0 \(\S+, process \d+\): student, step 4, for \d+ s", places[0])
    assert re.fullmatch(r"gadcore: rank 1 \(.*: \w+, step \d, for \d+ s; does not answer any more", places[1])


def test_a_process_that_hangs_is_ended_with_its_stack(ended) -> None:
    job, codes, text = ended["hang"]
    assert codes == [1, 1], text
    assert "Timed out" in told(job.output(0))[0]
    assert "rank 1 (" in told(job.output(0))[2] and "does not answer" not in told(job.output(0))[2]
    (line,) = told(job.output(1))
    assert line.startswith("gadcore: rank 1 ends in student, step 4: rank 0 failed: ")
    assert "failing_job.py" in job.output(1) and "in fail" in job.output(1)


def test_an_error_of_one_is_shown_as_it_is(ended) -> None:
    job, codes, text = ended["raise"]
    assert codes == [1, 1], text
    assert "ZeroDivisionError: a mistake of the program" in job.output(1) and "Traceback" not in job.output(0)
    assert told(job.output(1))[0] == "gadcore: rank 1 has failed: ZeroDivisionError: a mistake of the program"
    assert told(job.output(0)) == [
        "gadcore: rank 0 ends in student, step 4: rank 1 failed: ZeroDivisionError: a mistake of the program"
    ]


def test_a_sentence_for_the_user_is_told_once(ended) -> None:
    _, codes, text = ended["told"]
    assert codes == [2, 2], text
    (line,) = told(text)
    assert re.fullmatch(r"gadcore: rank 1 on \S+: the disk is full: make room", line)
    _, codes, text = ended["all"]
    assert codes == [2, 2] and told(text) == ["gadcore: nobody can read it: give another one"], text
    assert "Traceback" not in text


def test_other_commands_are_of_one_process(ended) -> None:
    _, codes, text = ended["eval"]
    assert codes == [2, 2] and told(text) == ["gadcore: eval is a command of one process: start it without torchrun"]


def test_a_signal_to_one_stops_all_after_the_same_step(ended) -> None:
    job, codes, text = ended["SIGTERM"]
    assert codes == [128 + signal.SIGTERM] * 2, text
    assert told(job.output(1)) == ["gadcore: rank 1: finishing the step, then saving"]
    assert told(job.output(0)) == ["gadcore: stopped by SIGTERM to rank 1 after step 5"]


def test_a_store_that_goes_away_ends_the_job(module_folder: Path) -> None:
    """torchrun was killed."""
    job = start_job(2, ["-m", "tests.support.failing_job", "hang", "600"], module_folder / "store")
    place = "gadcore-watch/0/place/1"
    while not (job.store.check([place]) and b'"step": 4' in job.store.get(place)):
        assert time.monotonic() - job.began < 60
        time.sleep(0.1)
    job.store = None
    assert job.wait(60) == [1, 1], job.output(0)
    assert "the job's store is gone" in job.output(1)
