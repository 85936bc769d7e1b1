"""FlashAttention 3, the hopper folder of the FlashAttention project, as a provider. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...config import LAYOUTS
from ...device import DeviceFacts
from ..interface import Capabilities
from .library import HALF, LibraryProvider, capability_refusal

if TYPE_CHECKING:
    import torch

    from .one_call import KernelCall


class FlashAttention3(LibraryProvider):
    """``flash_attn_with_kvcache`` on packed queries: any page size, any strides whose last axis is contiguous."""

    name = "fa3"
    device_types = frozenset({"cuda"})
    title = "FlashAttention 3"
    module = "flash_attn_interface"
    function = "flash_attn_with_kvcache"
    parameters = (
        "cache_seqlens", "page_table", "cu_seqlens_q", "max_seqlen_q", "softmax_scale", "causal", "window_size",
        "softcap", "num_splits",
    )  # fmt: skip
    distributions = ("flash-attn-3", "flash_attn_3")
    install = "build the hopper folder of github.com/Dao-AILab/flash-attention"
    capturable = True
    reads_unwritten_slots = True
    """Seen on an H200: prefills load pages of whole key tiles (128 tokens) by TMA, and 0 times NaN is NaN."""

    def constraints(self, device: DeviceFacts) -> Capabilities:
        """K and V in the queries' dtype (fp8 pages need fp8 queries there); sinks are not in its interface."""
        return Capabilities(
            name="flash",
            owner="flash by fa3",
            dtypes=HALF,
            kv_cache_dtypes=HALF,
            same_kv_dtype=True,
            head_size_multiple=8,
            max_head_size=256,
            layouts=LAYOUTS,
            sliding_window=True,
            soft_cap=True,
            encoder_only=True,
            reads_unwritten_slots=self.reads_unwritten_slots,
        )

    def device_refusal(self, device: DeviceFacts) -> str | None:
        """Hopper only."""
        return capability_refusal(self.title, device, (9,), (9, 0))

    def attend(self, function: Callable[..., Any], call: KernelCall) -> torch.Tensor:
        """0 splits lets the library choose them from its host bounds, which hold for every replay of a graph."""
        output: torch.Tensor = function(
            call.query,
            call.key,
            call.value,
            cache_seqlens=call.seq_lens,
            page_table=call.block_table,
            cu_seqlens_q=call.query_start,
            max_seqlen_q=call.max_query_len,
            softmax_scale=call.scale,
            causal=call.causal,
            window_size=call.window if call.window[0] >= 0 else (-1, -1),
            softcap=call.soft_cap or 0.0,
            num_splits=0,
        )
        return output
