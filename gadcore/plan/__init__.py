"""What a run will need, before it is started: memory of every state and rank, time of every phase, and what fits."""
