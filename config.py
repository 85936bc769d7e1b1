"""The user's settings as frozen records. ``None`` and ``"auto"`` mean that makeready chooses and says why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from .errors import ConfigError, did_you_mean

MambaCacheMode = Literal["none", "align", "all"]
PAGE_STRATEGIES: tuple[str, ...] = ("unified", "subdivided")
MAMBA_BACKENDS: tuple[str, ...] = ("triton", "flashinfer")
MAMBA_CACHE_MODES: tuple[str, ...] = ("none", "align", "all")
DTYPES: tuple[str, ...] = ("float32", "bfloat16", "float16")
KV_CACHE_DTYPES: tuple[str, ...] = (
    "auto", "float32", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2", "nvfp4",
    "int8_per_token_head", "fp8_per_token_head", "int4_per_token_head", "fp8_ds_mla", "nvfp4_ds_mla",
)  # fmt: skip
LEAST_FLEX_BLOCK = 16
"""Rows and columns of the smallest matrix product in Triton."""
LAYOUTS: tuple[str, ...] = ("NHD", "HND", "cross_layer_NHD", "cross_layer_HND")

ALIASES: Mapping[str, str] = MappingProxyType({
    "tp": "tensor_parallel_size",
    "pp": "pipeline_parallel_size",
    "dp": "data_parallel_size",
    "memory": "memory_bytes",
    "device_memory": "device_memory_bytes",
    "provider": "flash_provider",
})  # fmt: skip
"""Names of the command line that are not those of the settings."""

T = TypeVar("T")


def setting(default: T, doc: str, unit: str = "") -> T:
    """A dataclass field with its documentation, which the reference page and ``--help`` print."""
    return field(default=default, metadata={"doc": doc, "unit": unit})


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which model, and how it is run."""

    model: str | Path | Mapping[str, Any] = setting(
        "", "preset name, checkpoint directory, config.json, or a dict with a config.json's content"
    )
    dtype: str = setting("auto", "weights' and activations' dtype; auto takes the checkpoint's")
    max_model_len: int | None = setting(
        None, "longest sequence, prompt and output together; None takes the model's own", "tokens"
    )
    seed: int = setting(0, "seed of sampling")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """The paged cache."""

    block_size: int | None = setting(
        None, "KV block size; checked and kept when given, else found in two phases", "tokens"
    )
    kv_cache_dtype: str = setting("auto", "dtype of K and V; auto takes the model's")
    kv_cache_dtype_skip_layers: tuple[int, ...] = setting((), "layers whose K and V stay in the model's dtype")
    page_strategy: str = setting(
        "auto",
        "how states and attention share the pool: unified (a block grows until it holds a state), subdivided (blocks "
        "stay small, states take runs of them), or auto, the one of those that the engine has which wastes less",
    )
    layout: str = setting("auto", "physical order: NHD, HND, cross_layer_NHD or cross_layer_HND")
    memory_bytes: int | None = setting(None, "memory for the cache; None derives it", "bytes")
    memory_fraction: float = setting(
        0.9, "share of the device's memory for weights, cache and what attention kernels take, without memory_bytes"
    )
    num_blocks: int | None = setting(None, "blocks in the pool, instead of a memory budget", "blocks")
    mamba_cache_mode: str = setting(
        "none", "where states are kept: none (one per request), align or all (at block boundaries)"
    )
    mamba_block_size: int | None = setting(
        None, "distance between kept states in modes align and all; respected or refused", "tokens"
    )
    mamba_cache_dtype: str = setting("auto", "dtype of convolution states; auto takes the model's")
    mamba_ssm_cache_dtype: str = setting("auto", "dtype of recurrent states; auto asks the family's rule")
    use_replayssm: bool = setting(
        False, "count vLLM's ReplaySSM: rings of recent inputs in every mamba2 state page (nemotron_h)"
    )
    replayssm_buffer_len: int = setting(16, "history of a ReplaySSM ring; flashinfer takes 16 at most", "tokens")
    mamba_backend: str = setting(
        "triton", "whose mamba2 kernels read ReplaySSM rings: triton, or flashinfer, whose rings are longer"
    )
    mamba_prefill_checkpoint_alignment: int | None = setting(
        None, "where prefill kernels can keep a state (align, all): blocks become a multiple of it", "tokens"
    )
    mla_page_alignment: int | None = setting(
        None, "pages of latents (MLA) are a multiple of this; vLLM's DeepSeek-V4 kernels: 576 packed, else 512", "bytes"
    )
    extra_retained_tokens: int = setting(
        0,
        "tokens below a sliding window whose blocks stay, with free_out_of_window (multi-module MTP: drafts - 1)",
        "tokens",
    )
    free_out_of_window: bool = setting(
        False, "count for an engine that returns blocks which have left a sliding window while a request runs"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionConfig:
    """Which attention backend, and what it must promise."""

    backend: str | None = setting(None, "attention backend for every layer: flex, flash, reference, or a plugin's")
    flash_provider: str | None = setting(
        None, "flash: whose kernels (makeready doctor lists them); used or refused; None takes the first that can serve"
    )
    mixer_backend: str = setting(
        "auto", "kernels of state layers: auto, triton, fla, mamba-ssm, causal-conv1d, reference, or a plugin's"
    )
    batch_invariant: bool = setting(False, "only backends whose output does not depend on the batch")
    flex_attn_block_m: int | None = setting(
        None, "flex: query rows that one kernel program computes; power of two from 16", "tokens"
    )
    flex_attn_block_n: int | None = setting(
        None, "flex: KV tokens that one kernel iteration loads; power of two from 16", "tokens"
    )
    flex_attn_q_block_size: int | None = setting(
        None, "flex: query block of the block mask; power of two, multiple of flex_attn_block_m", "tokens"
    )
    flex_attn_kv_block_size: int | None = setting(
        None, "flex: KV block of the block mask; power of two from 16, multiple of flex_attn_block_n", "tokens"
    )

    @property
    def asked_backend(self) -> str | None:
        """The one backend that the user named, himself or by its provider."""
        return "flash" if self.backend is None and self.flash_provider is not None else self.backend


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """How the model is spread over devices."""

    tensor_parallel_size: int = setting(1, "ranks that share each layer", "devices")
    pipeline_parallel_size: int = setting(1, "stages that the layers are cut into, one after the other", "stages")
    data_parallel_size: int = setting(1, "replicas of the whole model, each with its own requests", "replicas")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceConfig:
    """Which device."""

    platform: str | None = setting(None, "platform: cpu, cuda, xpu or a plugin's; None takes the best that probes")
    device_index: int = setting(0, "ordinal of the device")
    device_memory_bytes: int | None = setting(None, "total memory to assume instead of the probed one", "bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """How many requests and tokens one step takes."""

    max_num_seqs: int = setting(8, "requests that run at the same time", "requests")
    max_num_batched_tokens: int = setting(512, "tokens of one step; longer prompts are prefilled in chunks", "tokens")
    num_speculative_tokens: int = setting(0, "draft tokens per step that states must keep room for", "tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionConfig:
    """How the embedded engine runs a model's forward. None lets the engine choose and say why."""

    packed_steps: bool | None = setting(
        None,
        "one forward per step for all requests, with mixer kernels for state layers; off: one for the decodes and one "
        "per prefill chunk, with the model's own mixers",
    )
    compile_layers: bool | None = setting(None, "compile decoder layers; packed steps only")
    cuda_graphs: bool | None = setting(None, "replay steps of decodes as CUDA graphs; packed steps only")
    async_scheduling: bool | None = setting(
        None, "prepare the next step while the device works; tokens are read one step late; packed steps only"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything that ``prepare`` takes.

    :raises ConfigError: from :meth:`validated` for a value that no part can take.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)

    @classmethod
    def from_options(cls, **options: Any) -> EngineConfig:
        """A config from flat option names, as the command line has them.

        :raises ConfigError: for an unknown name, with those that come close.
        """
        parts = {part.name: type(getattr(cls(), part.name)) for part in fields(cls)}
        owners = {setting.name: part for part, record in parts.items() for setting in fields(record)}
        given: dict[str, dict[str, Any]] = {part: {} for part in parts}
        for name, value in options.items():
            if name not in owners:
                hint = f", did you mean {ALIASES[name]}" if name in ALIASES else did_you_mean(name, owners)
                raise ConfigError(
                    f"setting {name!r} is not known{hint}; `makeready plan --help`, `makeready launch --help` and "
                    "docs/reference/settings.md have all of them",
                    option=name,
                    value=value,
                    expected=sorted(owners),
                )
            given[owners[name]][name] = value
        return cls(**{part: record(**given[part]) for part, record in parts.items()}).validated()

    def validated(self) -> EngineConfig:
        """This config, once every value is one that its setting can take."""
        cache, attention, scheduler = self.cache, self.attention, self.scheduler
        for option, value in (
            ("block_size", cache.block_size),
            ("mamba_block_size", cache.mamba_block_size),
            ("mamba_prefill_checkpoint_alignment", cache.mamba_prefill_checkpoint_alignment),
            ("replayssm_buffer_len", cache.replayssm_buffer_len),
            ("mla_page_alignment", cache.mla_page_alignment),
            ("num_blocks", cache.num_blocks),
            ("memory_bytes", cache.memory_bytes),
            ("device_memory_bytes", self.device.device_memory_bytes),
            ("max_model_len", self.model.max_model_len),
            ("tensor_parallel_size", self.parallel.tensor_parallel_size),
            ("pipeline_parallel_size", self.parallel.pipeline_parallel_size),
            ("data_parallel_size", self.parallel.data_parallel_size),
            ("max_num_seqs", scheduler.max_num_seqs),
            ("max_num_batched_tokens", scheduler.max_num_batched_tokens),
        ):
            _require_positive(option, value)
        _require_one_of("dtype", self.model.dtype, ("auto", *DTYPES))
        _require_one_of("kv_cache_dtype", cache.kv_cache_dtype, KV_CACHE_DTYPES)
        _require_one_of("page_strategy", cache.page_strategy, ("auto", *PAGE_STRATEGIES))
        _require_one_of("layout", cache.layout, ("auto", *LAYOUTS))
        _require_one_of("mamba_cache_mode", cache.mamba_cache_mode, MAMBA_CACHE_MODES)
        _require_one_of("mamba_backend", cache.mamba_backend, MAMBA_BACKENDS)
        _require_one_of("mamba_cache_dtype", cache.mamba_cache_dtype, ("auto", *DTYPES))
        _require_one_of("mamba_ssm_cache_dtype", cache.mamba_ssm_cache_dtype, ("auto", *DTYPES))
        for option, value in (
            ("num_speculative_tokens", scheduler.num_speculative_tokens),
            ("extra_retained_tokens", cache.extra_retained_tokens),
            ("device_index", self.device.device_index),
            ("seed", self.model.seed),
        ):
            _require_whole(option, value, 0)
        for option in ("packed_steps", "compile_layers", "cuda_graphs", "async_scheduling"):
            _require_switch(option, getattr(self.execution, option), True, False, None)
        for option, switch in (
            ("batch_invariant", attention.batch_invariant),
            ("free_out_of_window", cache.free_out_of_window),
            ("use_replayssm", cache.use_replayssm),
        ):
            _require_switch(option, switch, True, False)
        share = cache.memory_fraction
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise ConfigError(
                f"memory_fraction {cache.memory_fraction!r} is not a share; give a number above 0 and up to 1",
                option="memory_fraction",
                value=cache.memory_fraction,
                expected="0 < memory_fraction <= 1",
            )
        _require_memory_once(cache, self.device)
        _require_layers("kv_cache_dtype_skip_layers", cache.kv_cache_dtype_skip_layers)
        if attention.flash_provider is not None and attention.backend not in (None, "flash"):
            raise ConfigError(
                f"flash_provider {attention.flash_provider!r} is a provider of flash, and backend "
                f"{attention.backend!r} is asked; leave one of them out",
                option="flash_provider",
                value=attention.flash_provider,
                expected=None,
            )
        _check_flex_blocks(attention)
        return self


def _require_memory_once(cache: CacheConfig, device: DeviceConfig) -> None:
    """Bytes for the cache are said once: by themselves, or as a share of a device that holds them."""
    asked, total = cache.memory_bytes, device.device_memory_bytes
    if asked is None:
        return
    if total is not None and asked > total:
        raise ConfigError(
            f"memory_bytes {asked} is more than device_memory_bytes {total}, the whole device; leave one of them out",
            option="memory_bytes",
            value=asked,
            expected=f"<= {total}",
        )
    usual = CacheConfig().memory_fraction
    if cache.memory_fraction != usual:
        raise ConfigError(
            f"memory_fraction {cache.memory_fraction:g} shares out a device's memory, and memory_bytes {asked} says"
            " what the cache has; leave one of them out",
            option="memory_fraction",
            value=cache.memory_fraction,
            expected=usual,
        )


def _require_positive(option: str, value: int | None) -> None:
    if value is not None:
        _require_whole(option, value, 1)


def _require_whole(option: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        words = "a whole number above zero" if least else "a whole number from 0"
        raise ConfigError(f"{option} {value!r} must be {words}", option=option, value=value, expected=words)


def _require_switch(option: str, value: object, *known: bool | None) -> None:
    if not any(value is one for one in known):
        raise ConfigError(
            f"{option} {value!r} is none of {', '.join(map(str, known))}",
            option=option,
            value=value,
            expected=list(known),
        )


def _require_layers(option: str, value: object) -> None:
    whole = isinstance(value, (tuple, list)) and all(type(layer) is int and layer >= 0 for layer in value)
    if not whole:
        raise ConfigError(
            f"{option} {value!r} must be layer indices, whole numbers from 0 on, such as (0, 5)",
            option=option,
            value=value,
            expected="layer indices",
        )


def _require_one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(
            f"{option} {value!r} is not known{did_you_mean(str(value), allowed)}; choose from {', '.join(allowed)}",
            option=option,
            value=value,
            expected=list(allowed),
        )


def _check_flex_blocks(attention: AttentionConfig) -> None:
    """Powers of two, and mask blocks that kernel tiles divide (torch's flex templates ask for both)."""
    for option in (
        "flex_attn_block_m", "flex_attn_block_n", "flex_attn_q_block_size", "flex_attn_kv_block_size"
    ):  # fmt: skip
        value = getattr(attention, option)
        _require_positive(option, value)
        # A query block is no side of a matrix product: short ones are padded.
        least = 1 if option == "flex_attn_q_block_size" else LEAST_FLEX_BLOCK
        if value is not None and (value < least or value & (value - 1)):
            below = max(least, 1 << (value.bit_length() - 1))
            nearest = [below] if value < below else [below, 2 * below]
            raise ConfigError(
                f"{option} {value} is not a power of two{f' of at least {least}' if least > 1 else ''}, which flex's "
                f"kernels need; nearest: {', '.join(map(str, nearest))}",
                option=option,
                value=value,
                expected=nearest,
            )
    for tile, block in (
        ("flex_attn_block_m", "flex_attn_q_block_size"),
        ("flex_attn_block_n", "flex_attn_kv_block_size"),
    ):
        small, large = getattr(attention, tile), getattr(attention, block)
        if small is not None and large is not None and large % small:
            raise ConfigError(
                f"{block} {large} is not a multiple of {tile} {small}",
                option=block,
                value=large,
                expected=f"a multiple of {small}",
            )
