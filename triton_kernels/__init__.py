"""Triton kernels for verification and drafting, each with its PyTorch reference beside it."""
