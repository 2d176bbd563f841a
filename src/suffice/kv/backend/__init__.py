"""Implementations of the computations of a policy: plain torch, and Triton kernels for GPUs."""
