"""FlashAttention 4, ``flash_attn.cute``, as a provider. No torch here."""

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


class FlashAttention4(LibraryProvider):
    """``flash_attn_varlen_func`` with a page table; compiled by CuTe at the first call of each kind."""

    name = "fa4"
    device_types = frozenset({"cuda"})
    title = "FlashAttention 4"
    module = "flash_attn.cute"
    function = "flash_attn_varlen_func"
    parameters = (
        "cu_seqlens_q", "max_seqlen_q", "max_seqlen_k", "seqused_k", "page_table", "softmax_scale", "causal",
        "window_size", "learnable_sink", "softcap", "num_splits",
    )  # fmt: skip
    distributions = ("flash-attn-4",)
    install = "pip install --pre 'flash-attn-4[cu13]'"
    reads_unwritten_slots = True
    """Pages that it loads by TMA are loaded whole, and a weight of 0 times NaN is NaN (its own documentation)."""

    def constraints(self, device: DeviceFacts) -> Capabilities:
        """Head sizes as its Hopper and Blackwell kernels have them; K and V in the queries' dtype."""
        return Capabilities(
            name="flash",
            owner="flash by fa4",
            dtypes=HALF,
            kv_cache_dtypes=HALF,
            same_kv_dtype=True,
            head_size_multiple=8,
            max_head_size=128 if _on_blackwell(device) else 256,
            layouts=LAYOUTS,
            sliding_window=True,
            soft_cap=True,
            sinks=True,
            encoder_only=True,
            reads_unwritten_slots=True,
        )

    def device_refusal(self, device: DeviceFacts) -> str | None:
        """Hopper and data-centre Blackwell: its other kernels take no pages."""
        return capability_refusal(self.title, device, (9, 10, 11), (9, 0))

    def only_when_asked(self, device: DeviceFacts) -> str | None:
        """On Hopper a long request is not split over the device."""
        if device.compute_capability is None or _on_blackwell(device):
            return None
        return "its kernels for compute capability 9.x do not split K and V, so decodes of few requests are slow"

    def attend(self, function: Callable[..., Any], call: KernelCall) -> torch.Tensor:
        """Windows are ``None`` where others write -1; 0 splits lets the library choose them where it can split."""
        before, after = call.window
        split = call.query.device.type == "cuda" and _major(call.query) >= 10
        output = function(
            call.query,
            call.key,
            call.value,
            cu_seqlens_q=call.query_start,
            max_seqlen_q=call.max_query_len,
            max_seqlen_k=call.max_seq_len,
            seqused_k=call.seq_lens,
            page_table=call.block_table,
            softmax_scale=call.scale,
            causal=call.causal,
            window_size=(before, after) if before >= 0 else (None, None),
            learnable_sink=call.sinks,
            softcap=call.soft_cap or 0.0,
            num_splits=0 if split else 1,
        )
        attended: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return attended


def _on_blackwell(device: DeviceFacts) -> bool:
    return device.compute_capability is not None and device.compute_capability[0] >= 10


def _major(tensor: torch.Tensor) -> int:
    import torch

    return torch.cuda.get_device_capability(tensor.device)[0]
