"""A tiny model, its plan and its cache, as the startup hook would make them: for tests of the embedded engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from makeready.attention_backends.interface import AttentionImpl, BuildRequest
from makeready.attention_backends.reference import ReferenceBackend
from makeready.cache.allocation import KVCache, allocate
from makeready.cache.layout import CacheLayout
from makeready.cache.specs import AttentionSpec, LayerGroup, LayerSpec, MambaSpec, StateTensor
from makeready.config import AttentionConfig, CacheConfig, EngineConfig, SchedulerConfig
from makeready.device import DeviceFacts
from makeready.engines.transformers.families import traits_of
from makeready.engines.transformers.probe import stored_by

CPU = DeviceFacts(platform="cpu", device_type="cpu")
MAX_MODEL_LEN = 256


@dataclass(frozen=True)
class TinyReady:
    cache: KVCache
    attention: Mapping[int, AttentionImpl]
    groups: tuple[LayerGroup, ...]
    block_size: int
    config: EngineConfig
    max_model_len: int
    cleared_groups: frozenset[int]


def backend_named(name: str) -> Any:
    if name == "flex":
        from makeready.attention_backends.flex import FlexBackend

        return FlexBackend()
    return ReferenceBackend()


def layers_of(model: Any) -> tuple[LayerSpec, ...]:
    config = model.config.get_text_config(decoder=True)
    facts = stored_by(model, traits_of(config.model_type))
    dtype = str(model.dtype).removeprefix("torch.")
    layers = []
    for index in sorted({layer for layer, _ in facts}):
        if (index, "K") in facts:
            (heads, width), (_, width_v) = facts[index, "K"][0], facts[index, "V"][0]
            mla = config.model_type == "kimi_linear"
            types = (getattr(config, "layer_types", None) or {index: ""})[index]
            layers.append(
                LayerSpec(
                    layer=index,
                    spec=AttentionSpec(
                        num_query_heads=config.num_attention_heads,
                        num_kv_heads=heads,
                        head_size=width,
                        head_size_v=width_v,
                        dtype=dtype,
                        mla=mla,
                        sliding_window=config.sliding_window if "sliding" in types else None,
                    ),
                )
            )
        states = tuple(
            StateTensor(name=what.split()[0], shape=shape, dtype=kind)
            for (layer, what), (shape, kind) in sorted(facts.items())
            if layer == index and "state" in what
        )
        if states:
            layers.append(LayerSpec(layer=index, spec=MambaSpec(kind="state", states=states)))
    return tuple(layers)


def grouped(layers: tuple[LayerSpec, ...], block_size: int) -> tuple[LayerGroup, ...]:
    buckets: dict[Any, list[LayerSpec]] = {}
    for layer in layers:
        buckets.setdefault(layer.spec, []).append(layer)
    return tuple(
        LayerGroup(
            index=index,
            kind=bucket[0].kind,
            layers=tuple(bucket),
            block_size=MAX_MODEL_LEN if bucket[0].is_state else block_size,
        )
        for index, bucket in enumerate(buckets.values())
    )


def make_ready(
    model: Any,
    *,
    backend: str = "reference",
    num_blocks: int = 128,
    block_size: int = 16,
    order: str = "NHD",
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 512,
    seed: int = 0,
) -> TinyReady:
    groups = grouped(layers_of(model), block_size)
    pages = [
        layer.spec.state_bytes if isinstance(layer.spec, MambaSpec) else layer.spec.page_size_bytes(block_size)
        for group in groups
        for layer in group.layers
    ]
    layout = CacheLayout(
        order=order,
        num_blocks=num_blocks,
        slots_per_block=max(len(g.layers) for g in groups),
        page_size_bytes=-(-max(pages) // 64) * 64,
        block_size=block_size,
        groups=groups,
    )
    cache = allocate(layout, torch.device("cpu"))
    cache.poison()
    maker = backend_named(backend)
    attention = {}
    built: dict[AttentionSpec, AttentionImpl] = {}
    for group in groups:
        for layer in group.layers:
            if isinstance(layer.spec, AttentionSpec):
                if layer.spec not in built:
                    built[layer.spec] = maker.build(
                        BuildRequest(
                            device=CPU,
                            spec=layer.spec,
                            dtype="float32",
                            block_size=block_size,
                            kernel_block_size=block_size,
                            num_blocks=num_blocks,
                            max_num_seqs=max_num_seqs,
                            max_num_batched_tokens=max_num_batched_tokens,
                            max_model_len=MAX_MODEL_LEN,
                            config=AttentionConfig(),
                        )
                    )
                attention[layer.layer] = built[layer.spec]
    reads = maker.capabilities(CPU).reads_unwritten_slots
    return TinyReady(
        cache=cache,
        attention=attention,
        groups=groups,
        block_size=block_size,
        config=EngineConfig(
            cache=CacheConfig(num_blocks=num_blocks),
            scheduler=SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens),
        ),
        max_model_len=MAX_MODEL_LEN,
        cleared_groups=frozenset(g.index for g in groups if reads and not g.is_state),
    )
