"""Sampling: the Engine protocol and the engines behind it."""

from gadcore.rollout.engine import Engine, SampleRequest, make_engine, wake_with

__all__ = ["Engine", "SampleRequest", "make_engine", "wake_with"]
