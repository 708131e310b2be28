"""Triton kernels without a GPU: run by the interpreter (numbers, races, traffic), or compiled only (registers, SASS).

interpreter, meter and guard need TRITON_INTERPRET=1; fakegpu and aot need it unset. The two never share a process.
"""
