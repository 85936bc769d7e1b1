"""vLLM's XPU kernels (``vllm-xpu-kernels``) as a provider. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...cache.specs import AttentionSpec
from ...device import DeviceFacts
from ...errors import BackendError
from ..interface import Capabilities
from .library import HALF, LibraryProvider

if TYPE_CHECKING:
    import torch

    from .one_call import KernelCall


class XpuKernels(LibraryProvider):
    """``flash_attn_varlen_func`` of vllm-xpu-kernels, on Xe2 and Xe3 devices."""

    name = "xpu-kernels"
    device_types = frozenset({"xpu"})
    title = "vllm-xpu-kernels"
    module = "vllm_xpu_kernels.flash_attn_interface"
    function = "flash_attn_varlen_func"
    parameters = (
        "seqused_k", "softmax_scale", "causal", "window_size", "softcap", "block_table", "s_aux",
    )  # fmt: skip
    distributions = ("vllm-xpu-kernels",)
    install = "pip install vllm-xpu-kernels, with the torch+xpu and oneAPI that it was built for"

    def constraints(self, device: DeviceFacts) -> Capabilities:
        """As vLLM 0.33 asks of them: blocks of a multiple of 64; pages in which the page stride counts whole tokens."""
        return Capabilities(
            name="flash",
            owner="flash by xpu-kernels",
            dtypes=HALF,
            kv_cache_dtypes=HALF,
            same_kv_dtype=True,
            kernel_block_multiple=64,
            head_sizes=(64, 96, 128, 192, 256, 512),
            layouts=("NHD", "cross_layer_NHD"),
            sliding_window=True,
            soft_cap=True,
            sinks=True,
            encoder_only=True,
        )

    def device_refusal(self, device: DeviceFacts) -> str | None:
        """Every Intel GPU is let through: the library itself says which it was built for."""
        return None

    def spec_refusal(self, spec: AttentionSpec) -> str | None:
        """The library computes shapes that it has no kernel for in PyTorch, and takes a window of 1 for none there."""
        if spec.sliding_window == 1:
            return "takes a sliding window of 1 for none where it falls back to PyTorch"
        return super().spec_refusal(spec)

    def loaded_refusal(self) -> str | None:
        """The package imports everywhere; its libraries may not have loaded."""
        if self._load(self.module, "FA2_AVAILABLE"):
            return None
        return f"{self.title} {self.version()} does not load: {self._load(self.module, 'FA2_UNAVAILABLE_REASON')}"

    def attend(self, function: Callable[..., Any], call: KernelCall) -> torch.Tensor:
        """The shape of its interface is FlashAttention 2's, with the pages' table and lengths by name.

        :raises BackendError: for pages whose stride is no whole number of tokens: the kernels address by tokens.
        """
        page, token = call.key.stride(0), call.key.stride(1)
        if page % token:
            raise BackendError(
                f"flash by {self.name} reads pages whose stride is a multiple of a token's, {token} elements; "
                f"it is {page}",
                option="page_strategy",
                value=page,
                expected=f"a multiple of {token}",
            )
        output: torch.Tensor = function(
            call.query,
            call.key,
            call.value,
            call.max_query_len,
            call.query_start,
            call.max_seq_len,
            seqused_k=call.seq_lens,
            softmax_scale=call.scale,
            causal=call.causal,
            window_size=list(call.window) if call.window[0] >= 0 else None,
            softcap=call.soft_cap or 0.0,
            block_table=call.block_table,
            s_aux=call.sinks,
        )
        return output
