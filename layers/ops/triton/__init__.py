"""Triton kernels for CUDA: nothing here is imported before a call is to run on them; `support` says when one can."""
