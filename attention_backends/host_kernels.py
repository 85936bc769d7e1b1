"""Attention kernels of a host engine, which makeready plans for and does not run: what each takes, as data.

They let ``plan`` answer for caches that no backend of makeready's own stores. Kernel blocks are those that vLLM 0.33.0
declares; the names are its own, in lower case.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from ..device import DeviceFacts
from ..errors import BackendError
from .interface import AttentionBackend, AttentionImpl, BuildRequest, Capabilities, Probe

HALF = frozenset({"bfloat16", "float16"})
FP8 = frozenset({"fp8_e4m3", "fp8_e5m2"})
PER_TOKEN_HEAD = frozenset({"int8_per_token_head", "fp8_per_token_head", "int4_per_token_head"})

FEW_DEVICES = frozenset(
    {"flashinfer_trtllm", "flash_attn_fa4_sm90", "flash_attn_fa4_sm100", "tokenspeed_mla", "cutlass_mla"}
)
"""Kernels of Hopper or Blackwell alone: planned for by name, or where nothing else serves."""


class HostBackend(AttentionBackend):
    """One of a host engine's backends: its capabilities per device type, and nothing that runs.

    :param engine: the host engine's name, for sentences.
    :param last_choice: True for kernels of few devices, which a plan that knows no device should not assume.
    """

    def __init__(
        self, name: str, engine: str, capabilities: Mapping[str, Capabilities], *, last_choice: bool = False
    ) -> None:
        self.name = name
        self.last_choice = last_choice
        self._engine = engine
        self._capabilities = MappingProxyType(dict(capabilities))

    def capabilities(self, device: DeviceFacts) -> Capabilities:
        """What the host engine says of it on this type of device; nothing elsewhere."""
        nothing = Capabilities(name=self.name, dtypes=frozenset(), kv_cache_dtypes=frozenset())
        return self._capabilities.get(device.device_type, nothing)

    def probe(self, device: DeviceFacts) -> Probe:
        """Never available: the kernels are the host engine's."""
        return Probe(available=False, reason=f"{self.name} is a backend of {self._engine}: planned for, not run here")

    def build(self, request: BuildRequest) -> AttentionImpl:
        """Refused.

        :raises BackendError: always.
        """
        raise BackendError(self.probe(request.device).reason, option="backend", value=self.name)


def vllm_backends() -> tuple[HostBackend, ...]:
    """Backends of vLLM 0.33.0 that store what flash, flex and reference do not, or take other blocks."""
    dense = Capabilities(
        name="",
        dtypes=HALF,
        kv_cache_dtypes=HALF | FP8,
        sliding_window=True,
        soft_cap=True,
        sinks=True,
    )
    latent = replace(dense, mla=True, mla_only=True, kv_cache_dtypes=HALF)
    sixteen = replace(dense, kernel_block_multiple=16, kv_cache_dtypes=HALF | FP8 | PER_TOKEN_HEAD)
    triton_mla = replace(latent, kernel_block_multiple=16, kv_cache_dtypes=HALF | FP8)
    declared: dict[str, dict[str, Capabilities]] = {
        "flashinfer": {
            "cuda": replace(dense, kernel_block_sizes=(16, 32, 64), kv_cache_dtypes=HALF | FP8 | {"nvfp4"})
        },
        "flashinfer_trtllm": {
            "cuda": replace(
                dense,
                kernel_block_sizes=(16, 32, 64, 128, 256, 512, 1024),
                kv_cache_dtypes=HALF | FP8 | {"nvfp4"},
            )
        },
        "flash_attn_fa4_sm90": {
            "cuda": replace(dense, kernel_block_sizes=(64,), kv_cache_dtypes=frozenset({"fp8_e4m3"}), head_sizes=(512,))
        },
        "flash_attn_fa4_sm100": {"cuda": replace(dense, kernel_block_sizes=(128,), head_sizes=(256,))},
        "triton_attn": {"cuda": sixteen, "xpu": sixteen},
        "flashmla": {
            "cuda": replace(latent, kernel_block_sizes=(64,), kv_cache_dtypes=HALF | FP8 | {"fp8_ds_mla"})
        },
        "flashinfer_mla": {
            "cuda": replace(latent, kernel_block_sizes=(32, 64), kv_cache_dtypes=HALF | {"nvfp4_ds_mla"})
        },
        "tokenspeed_mla": {"cuda": replace(latent, kernel_block_sizes=(32, 64), kv_cache_dtypes=HALF | FP8)},
        "cutlass_mla": {"cuda": replace(latent, kernel_block_sizes=(128,), kv_cache_dtypes=HALF | FP8)},
        "flash_attn_mla": {
            "cuda": replace(latent, kernel_block_multiple=16), "xpu": replace(latent, kernel_block_multiple=64),
        },
        "triton_mla": {"cuda": triton_mla, "xpu": triton_mla},
        "cpu_attn": {"cpu": replace(dense, kernel_block_multiple=32)},
        "amx_mla": {"cpu": replace(latent, kernel_block_multiple=32)},
        "cpu_mla": {"cpu": replace(latent, exact_block_sizes=(16,))},
    }  # fmt: skip
    return tuple(
        HostBackend(
            name,
            "vLLM",
            {device: replace(found, name=name) for device, found in by_device.items()},
            last_choice=name in FEW_DEVICES,
        )
        for name, by_device in declared.items()
    )
