"""What this machine and this environment have for a run, what is missing, and the command that mends it."""
