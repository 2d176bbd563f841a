"""Triton kernels for operations on graphs that are limited by memory bandwidth on a GPU (docs/gpu.md).

* `match_neighbors`: neighbors of one node that are, or are not, neighbors of another node.
* `segment_min`: minimum of each column over segments of rows.

The modules of this package import Triton. Import them only after `suffice.gpu.can_use_kernels` has returned True.
"""
