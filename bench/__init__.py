"""Measurements of the kernels: CPU timings, and what can be known about the GPU kernels without a GPU."""
