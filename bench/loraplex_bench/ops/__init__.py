"""Timings of the kernels beside the same operation by other means."""
