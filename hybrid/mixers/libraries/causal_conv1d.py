"""causal-conv1d as mixer kernels. No torch here: ``plan`` and ``doctor`` read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from .backend import LibraryFunction, LibraryMixerBackend

if TYPE_CHECKING:
    from ..interface import MixerKernels


class CausalConv1dBackend(LibraryMixerBackend):
    """The convolution of layers that are nothing else; other kinds have a recurrence too, which it has not."""

    name = "causal-conv1d"
    title = "causal-conv1d"
    distributions = ("causal-conv1d", "causal_conv1d")
    oldest = (1, 7)
    install = "pip install causal-conv1d, which compiles for the installed torch"
    functions = MappingProxyType(
        {
            "convolve": LibraryFunction(
                module="causal_conv1d", name="causal_conv1d_fn", parameters=("bias", "seq_idx", "activation")
            )
        }
    )
    kinds = frozenset({"shortconv"})
    device_types = frozenset({"cuda"})
    lacks = MappingProxyType(dict.fromkeys(("mamba1", "mamba2", "gdn", "kda"), "it computes the convolution alone"))

    def kernels(self, functions: Mapping[str, Callable[..., Any]]) -> MixerKernels:
        """The mixers on this function."""
        from .causal_conv1d_mixers import CausalConv1dMixers

        return CausalConv1dMixers(functions["convolve"])
