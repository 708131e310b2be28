"""What a first run on a GPU must answer in ten minutes, stage by stage, and a rehearsal of it on a CPU."""
