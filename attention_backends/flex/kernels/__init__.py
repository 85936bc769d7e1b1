"""Triton kernels around torch's own."""
