"""mamba-ssm as mixer kernels. No torch here: ``plan`` and ``doctor`` read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from .backend import LibraryFunction, LibraryMixerBackend

if TYPE_CHECKING:
    from ..interface import MixerKernels


class MambaSsmBackend(LibraryMixerBackend):
    """The chunked scan of mamba2: fresh requests packed in one call, one call for each that continues a state."""

    name = "mamba-ssm"
    title = "mamba-ssm"
    distributions = ("mamba-ssm", "mamba_ssm")
    oldest = (2, 3)
    install = "pip install mamba-ssm, which compiles for the installed torch"
    functions = MappingProxyType(
        {
            "scan": LibraryFunction(
                module="mamba_ssm.ops.triton.ssd_combined",
                name="mamba_chunk_scan_combined",
                parameters=(
                    "chunk_size", "D", "z", "dt_bias", "initial_states", "seq_idx", "cu_seqlens", "dt_softplus",
                    "dt_limit", "return_final_states", "return_varlen_states",
                ),
            )
        }
    )  # fmt: skip
    kinds = frozenset({"mamba2"})
    device_types = frozenset({"cuda"})
    lacks = MappingProxyType({"mamba1": "its selective_scan_fn takes no packed requests and no state to start from"})

    def kernels(self, functions: Mapping[str, Callable[..., Any]]) -> MixerKernels:
        """The mixers on this function."""
        from .mamba_ssm_mixers import MambaSsmMixers

        return MambaSsmMixers(functions["scan"])
