"""Checkpoints: the store, what a model's state is, and export."""
