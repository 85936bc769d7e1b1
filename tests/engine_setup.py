"""A tiny model's plan, cache and backends, as the startup hook would make them: for tests of the embedded engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from makeready.attention_backends.flash import FlashBackend
from makeready.attention_backends.flex import FlexBackend
from makeready.attention_backends.interface import AttentionBackend, AttentionImpl, BuildRequest
from makeready.attention_backends.reference import ReferenceBackend
from makeready.cache.allocation import KVCache, allocate
from makeready.cache.grouping import group_layers, slots_per_block
from makeready.cache.layout import CacheLayout
from makeready.cache.specs import AttentionSpec, LayerGroup
from makeready.config import AttentionConfig, EngineConfig
from makeready.device import DeviceFacts
from makeready.hybrid.mixers.interface import MixerKernels
from makeready.hybrid.mixers.libraries import FlaBackend
from makeready.hybrid.mixers.reference import ReferenceMixerBackend
from makeready.hybrid.mixers.selection import choose_mixers, mixer_requests
from makeready.hybrid.mixers.triton import TritonMixerBackend
from makeready.hybrid.model_specs import ModelSpec, read_model
from makeready.platforms.cpu import CPU
from makeready.platforms.kernel_blocks import kernel_block_size
from makeready.platforms.planning import plan_model
from makeready.platforms.ready import Ready
from makeready.platforms.ready import make_ready as platforms_make_ready

DEVICE = DeviceFacts(platform="cpu", device_type="cpu")
MAX_MODEL_LEN = 256
NUM_BLOCKS = 64
PAGE_BYTES = 24576
"""Holds any tiny family's state, and a multiple of 16 tokens of each: one geometry, so that flex compiles once."""


@dataclass(frozen=True)
class TinyReady:
    cache: KVCache
    attention: Mapping[int, AttentionImpl]
    groups: tuple[LayerGroup, ...]
    block_size: int
    config: EngineConfig
    max_model_len: int
    cleared_groups: frozenset[int]
    device: DeviceFacts = DEVICE
    mixers: MixerKernels | None = None


def backend_named(name: str) -> AttentionBackend:
    return {"reference": ReferenceBackend, "flex": FlexBackend, "flash": FlashBackend}[name]()


def spec_of(model: Any, mamba_ssm_cache_dtype: str = "auto") -> ModelSpec:
    return read_model(
        model.config.to_dict(),
        engine="transformers",
        dtype=str(model.dtype).removeprefix("torch."),
        mamba_ssm_cache_dtype=mamba_ssm_cache_dtype,
    )


def make_ready(
    model: Any,
    *,
    backend: str = "reference",
    order: str = "NHD",
    block_size: int = 16,
    device: DeviceFacts = DEVICE,
    **options: Any,
) -> TinyReady:
    """One small geometry for every family."""
    spec = spec_of(model)
    groups = group_layers(spec.layers, block_size, MAX_MODEL_LEN)
    layout = CacheLayout(
        order=order,
        num_blocks=NUM_BLOCKS,
        slots_per_block=slots_per_block(groups),
        page_size_bytes=PAGE_BYTES,
        block_size=block_size,
        groups=groups,
    )
    config = EngineConfig.from_options(**options)
    kv_cache = allocate(layout, torch.device(device.device_type))
    kv_cache.poison()
    clears = backend_named(backend).capabilities(device).reads_unwritten_slots
    return TinyReady(
        device=device,
        cache=kv_cache,
        attention={
            layer.layer: _built(backend, layer.spec, spec.dtype, block_size, device) for layer in spec.attention_layers
        },
        groups=groups,
        block_size=block_size,
        config=config,
        mixers=_mixers(spec, config, device),
        max_model_len=MAX_MODEL_LEN,
        cleared_groups=frozenset(group.index for group in groups if clears and not group.is_state),
    )


def planned_ready(model: Any, *, backend: str = "reference", num_blocks: int = 24, **options: Any) -> Ready:
    """The geometry that the CPU platform decides."""
    config = EngineConfig.from_options(num_blocks=num_blocks, max_model_len=MAX_MODEL_LEN, **options)
    spec = spec_of(model, config.cache.mamba_ssm_cache_dtype)
    one = backend_named(backend)
    mixers = choose_mixers(
        mixer_requests(spec.layers, spec.dtype),
        (ReferenceMixerBackend(),),
        DEVICE,
        asked=config.attention.mixer_backend,
    )
    chosen = dict.fromkeys((layer.layer for layer in spec.attention_layers), one)
    capabilities = {layer: backend.capabilities(DEVICE) for layer, backend in chosen.items()}
    plan = plan_model(spec, CPU, capabilities, config, DEVICE)
    ready = platforms_make_ready(config, plan, chosen, DEVICE, mixers.backend if mixers else None)
    ready.cache.poison()
    return ready


def _mixers(spec: ModelSpec, config: EngineConfig, device: DeviceFacts) -> MixerKernels | None:
    backends = (ReferenceMixerBackend(), TritonMixerBackend(), FlaBackend())
    named = {backend.name: backend for backend in backends}
    asked = config.attention.mixer_backend
    needed = mixer_requests(spec.layers, spec.dtype)
    return named["reference" if asked == "auto" else asked].build(device) if needed else None


@cache
def _built(backend: str, spec: AttentionSpec, dtype: str, block_size: int, device: DeviceFacts) -> AttentionImpl:
    """Shared by all engines of the test run: what flex compiles is kept."""
    return backend_named(backend).build(
        BuildRequest(
            device=device,
            spec=spec,
            dtype=dtype,
            block_size=block_size,
            kernel_block_size=kernel_block_size(backend_named(backend).capabilities(device), block_size),
            num_blocks=NUM_BLOCKS,
            max_num_seqs=8,
            max_num_batched_tokens=512,
            max_model_len=MAX_MODEL_LEN,
            config=AttentionConfig(),
        )
    )
