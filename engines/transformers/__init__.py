"""The embedded engine on Hugging Face transformers: models run unmodified on the paged cache.

Import what you need from the submodules; ``scheduler``, ``requests``, ``families`` and ``records`` need no torch.
"""
