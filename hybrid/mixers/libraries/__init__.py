"""Prefill kernels of installed libraries behind the mixers' interface; decodes stay on the package's own kernels."""

from .causal_conv1d import CausalConv1dBackend
from .fla import FlaBackend
from .mamba_ssm import MambaSsmBackend

__all__ = ["CausalConv1dBackend", "FlaBackend", "MambaSsmBackend"]
