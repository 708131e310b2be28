"""python -m gadcore.run doctor [--json]: driver, GPUs, packages, libraries and room, and what mends what is wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from gadcore.config.driver import find_driver
from gadcore.config.process import set_environment
from gadcore.config.settings import Config
from gadcore.doctor.check import Check
from gadcore.doctor.machine import (
    driver_checks,
    native_checks,
    python_check,
    room_checks,
    stack_of,
    torch_check,
)
from gadcore.doctor.packages import Stack, lock_check, optional_checks, stack_checks
from gadcore.errors import UserError
from gadcore.files import cache_dir
from gadcore.record.run_folder import RUNS
from gadcore.text import say

_MARKS = {"ok": "  ", "note": "- ", "wrong": "! "}


def main(arguments: Sequence[str]) -> int:
    """Prints the table, or with --json an object; returns 0, or 2 where something is wrong."""
    if unknown := [argument for argument in arguments if argument != "--json"]:
        raise UserError(f"doctor takes --json and nothing else, not {' '.join(unknown)}")
    set_environment(0, "auto")
    stack, checks = examine()
    wrong = [check for check in checks if check.status == "wrong"]
    if "--json" in arguments:
        told = {"ok": not wrong, "stack": stack, "checks": [check._asdict() for check in checks]}
        print(json.dumps(told, indent=1))
        return 2 if wrong else 0
    width = max(len(check.name) for check in checks)
    for check in checks:
        say(f"{_MARKS[check.status]}{check.name:{width}}  {check.value}")
        if check.mend:
            say(f"  {'':{width}}  mend: {check.mend}")
    say("")
    say(f"{len(wrong)} wrong: a run would fail, or not be what was meant" if wrong else "nothing is wrong")
    return 2 if wrong else 0


def examine() -> tuple[Stack, list[Check]]:
    """The stack that this machine asks for, and every check."""
    driver, checks = driver_checks()
    stack = stack_of(driver)
    torch, device = torch_check(driver, stack)
    checks = [python_check(), *checks, device, *stack_checks(stack), *optional_checks()]
    if torch is not None:
        checks += [*native_checks(stack), *room_checks(stack, RUNS, cache_dir())]
    return stack, [*checks, lock_check(stack)]


def at_start(config: Config) -> None:
    """Says what is wrong with the packages of a run, where something is; reads metadata alone, and ends nothing.

    Whether torch sees the GPU is asked where the device is chosen (gadcore.config.device), which ends a run.
    """
    driver = None if config.run.device == "cpu" else find_driver()
    for check in stack_checks(stack_of(driver), vllm=config.rollout.engine == "vllm"):
        if check.status == "wrong":
            say(f"gadcore: {check.name} {check.value}; mend: {check.mend} (gadcore doctor says more)", sys.stderr)
