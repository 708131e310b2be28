"""Rows, chat templates, groups and batches."""
