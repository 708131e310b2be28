"""Every op of ours beside its opponents, on equal inputs: CPU timings, and those on a CUDA device."""
