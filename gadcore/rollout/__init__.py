"""Sampling: the sampler, where it gets its weights from, and the engines behind it."""
