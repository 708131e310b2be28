"""The default job, a run for every seed."""
