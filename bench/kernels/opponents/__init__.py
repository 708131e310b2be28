"""The other ways of computing what the kernels compute, on equal tokens, and the inputs that all sides get."""
