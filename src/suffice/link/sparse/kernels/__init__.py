"""Triton kernels for the primitives that plain torch keeps far from the memory's bandwidth (docs/gpu.md).

* `matching`: neighbours of one node that are, or are not, neighbours of another.
* `least`: least of each column over lists of rows.
"""
