"""Implementations of the numerical work of a policy: plain torch, and Triton kernels for GPUs."""
