"""Triton kernels on vLLM's paged key/value layout, each with its PyTorch reference beside it.

None ships yet: on the CPU the references are the product, and they live with the
verifiers and proposers that use them.
"""
