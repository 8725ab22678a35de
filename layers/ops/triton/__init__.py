"""Triton kernels for CUDA, imported only when a call is about to run on them; `support` checks whether one can."""
