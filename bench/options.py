"""Types of command-line options, for argparse."""

from __future__ import annotations

import argparse

from bench import record


def numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 1,2") from None


def threads(text: str) -> list[int]:
    """Thread counts that this machine has cores for."""
    counts = numbers(text)
    if any(not 1 <= count <= record.cores() for count in counts):
        raise argparse.ArgumentTypeError(f"must be from 1 to {record.cores()}, the cores of this machine, are {text}")
    return counts


def count(text: str) -> int:
    return _from(1, text)


def seed(text: str) -> int:
    return _from(0, text)


def _from(least: int, text: str) -> int:
    if not text.isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a number from {least}, is {text}")
    return int(text)


def names(text: str) -> list[str]:
    return text.split(",")
