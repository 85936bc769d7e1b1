"""flash-linear-attention as mixer kernels. No torch here: ``plan`` and ``doctor`` read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ....cache.block_size import Constraint, MultipleOf
from ....device import DeviceFacts
from .backend import LibraryFunction, LibraryMixerBackend

if TYPE_CHECKING:
    from ..interface import MixerKernels

_PACKED = ("q", "k", "v", "scale", "initial_state", "output_final_state", "cu_seqlens", "cu_seqlens_cpu")
_DELTA = (*_PACKED, "g", "beta", "use_qk_l2norm_in_kernel")

CHUNK = 64
"""Tokens that its kernels take at once."""


class FlaBackend(LibraryMixerBackend):
    """Chunked delta rules, decayed linear attention and convolution of ``fla-core``."""

    name = "fla"
    title = "flash-linear-attention"
    distributions = ("fla-core", "flash-linear-attention")
    oldest = (0, 6)
    install = "pip install fla-core, or makeready[fla]"
    functions = MappingProxyType(
        {
            "gated_delta": LibraryFunction(
                module="fla.ops.gated_delta_rule", name="chunk_gated_delta_rule", parameters=_DELTA
            ),
            "kda": LibraryFunction(module="fla.ops.kda", name="chunk_kda", parameters=_DELTA),
            "simple_gla": LibraryFunction(
                module="fla.ops.simple_gla", name="chunk_simple_gla", parameters=(*_PACKED, "g_gamma")
            ),
            "causal_conv": LibraryFunction(
                module="fla.modules.causal_conv1d",
                name="causal_conv1d",
                parameters=(
                    "x", "weight", "bias", "initial_state", "output_final_state", "activation", "cu_seqlens",
                    "cu_seqlens_cpu",
                ),
            ),
        }
    )  # fmt: skip
    kinds = frozenset({"gdn", "kda", "lightning", "shortconv"})
    device_types = frozenset({"cuda", "xpu"})
    lacks = MappingProxyType({"mamba2": "it has layers for it that call mamba-ssm", "mamba1": "it has layers alone"})

    def block_size_constraints(self, kinds: frozenset[str], device: DeviceFacts) -> tuple[Constraint, ...]:
        """On XPU blocks end where its chunks end, as vLLM asks of gated delta nets there."""
        if device.device_type != "xpu" or not kinds & {"gdn", "kda"}:
            return ()
        return (MultipleOf(CHUNK, owner="fla's delta rule on xpu"),)

    def kernels(self, functions: Mapping[str, Callable[..., Any]]) -> MixerKernels:
        """The mixers on these functions."""
        from .fla_mixers import FlaMixers

        return FlaMixers(functions)
