"""Packed steps: the tokens of all requests of a step, decodes and prefill chunks, in one forward of shape (1, T)."""
