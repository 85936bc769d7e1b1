"""torch's own varlen attention over a block table, as a provider. No torch at the top of this file."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...config import LAYOUTS
from ...device import DeviceFacts
from ..installed import release
from ..interface import Capabilities
from .library import HALF, LibraryProvider, capability_refusal

if TYPE_CHECKING:
    import torch

    from .one_call import KernelCall

LEAST_TORCH = (2, 12)
"""The first whose ``varlen_attn`` takes a block table."""
PAGE_MULTIPLE = 256
"""What its kernels (FlashAttention 2) ask of a page."""


class TorchVarlen(LibraryProvider):
    """``torch.nn.attention.varlen.varlen_attn``: FlashAttention 2, on pages of a multiple of 256 tokens."""

    name = "varlen"
    device_types = frozenset({"cuda"})
    title = "torch's varlen attention"
    module = "torch.nn.attention.varlen"
    function = "varlen_attn"
    parameters = ("scale", "window_size", "enable_gqa", "seqused_k", "block_table")
    distributions = ("torch",)
    install = "pip install 'torch>=2.12' for CUDA"

    def constraints(self, device: DeviceFacts) -> Capabilities:
        """No soft cap and no sinks in its interface."""
        return Capabilities(
            name="flash",
            owner="flash by varlen",
            dtypes=HALF,
            kv_cache_dtypes=HALF,
            same_kv_dtype=True,
            kernel_block_multiple=PAGE_MULTIPLE,
            head_size_multiple=8,
            max_head_size=256,
            layouts=LAYOUTS,
            sliding_window=True,
            encoder_only=True,
        )

    def device_refusal(self, device: DeviceFacts) -> str | None:
        """Ampere and newer."""
        return capability_refusal(self.title, device, (8, 9, 10, 11, 12), (8, 0))

    def version_refusal(self) -> str | None:
        """The block table came with torch 2.12."""
        found = self.version()
        if found is not None and release(found) < LEAST_TORCH:
            return (
                f"{self.title} takes a block table from torch 2.12 on, and torch {found} is installed ({self.install})"
            )
        return None

    def loaded_refusal(self) -> str | None:
        """Its kernels are in CUDA builds of torch alone."""
        if self._load("torch.version", "cuda") is None:
            return (
                f"{self.title} has no kernels in torch {self.version()}, which is built without CUDA ({self.install})"
            )
        return None

    def attend(self, function: Callable[..., Any], call: KernelCall) -> torch.Tensor:
        """A causal mask is a window that ends at the query itself."""
        output: torch.Tensor = function(
            call.query,
            call.key,
            call.value,
            call.query_start,
            None,
            call.max_query_len,
            call.max_seq_len,
            scale=call.scale,
            window_size=call.window,
            enable_gqa=True,
            seqused_k=call.seq_lens,
            block_table=call.block_table,
        )
        return output
