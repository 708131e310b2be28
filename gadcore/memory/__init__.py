"""Phases of a step: who may hold the device when."""
