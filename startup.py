"""The face: ``plan`` decides without the device, ``prepare`` makes an engine ready on it, ``launch`` runs a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from inspect import signature
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from .attention_backends.host_kernels import vllm_backends
from .attention_backends.interface import AttentionBackend, Probe
from .attention_backends.workspace import StepLimits
from .config import EngineConfig
from .device import DeviceFacts
from .engines.asked import require_followed
from .engines.checkpoint import require_checkpoint
from .engines.installed import require_torch, require_transformers
from .errors import ConfigError, PlatformError, PluginError
from .hybrid.mixers.backend import MixerBackend
from .hybrid.mixers.selection import ModelMixers, Probes, choose_mixers, mixer_requests
from .hybrid.model_specs import ModelSpec, read_model
from .hybrid.replay_rings import Replay
from .platforms.backends import choose_backends
from .platforms.interface import Platform
from .platforms.known import plannable_platforms
from .platforms.plan import Plan
from .platforms.planning import block_size_request, plan_model, without_idle_blocks
from .platforms.ready import Ready, make_ready
from .platforms.selection import select_platform
from .plugins.manager import Plugins, load_plugins
from .plugins.records import BackendOffers

if TYPE_CHECKING:
    from .engines.transformers.records import Completion, Progress, SamplingParams

Model = str | Path | Mapping[str, Any]

BUNDLED_MODEL = Path(__file__).parent / "engines" / "transformers" / "tiny_hybrid"
"""Checkpoint directory of the small hybrid model that comes with the package."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Surroundings:
    """Where a plan is made for: a platform, its device, the plugins' backends, and what was said on the way."""

    platform: Platform
    device: DeviceFacts
    plugins: Plugins
    backends: tuple[AttentionBackend, ...]
    mixers: tuple[MixerBackend, ...]
    """Kernels of state layers."""
    probes: Mapping[str, Probe] | None
    """Per backend what its probe found; ``None`` plans for a device that is not here."""
    reasons: tuple[str, ...]
    refusals: tuple[str, ...]


def plan(
    model: Model | EngineConfig,
    *,
    platform: str | None = None,
    backend: str | None = None,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    data_parallel_size: int = 1,
    dtype: str = "auto",
    kv_cache_dtype: str = "auto",
    kv_cache_dtype_skip_layers: tuple[int, ...] = (),
    block_size: int | None = None,
    mamba_block_size: int | None = None,
    mamba_cache_mode: str = "none",
    mamba_cache_dtype: str = "auto",
    mamba_ssm_cache_dtype: str = "auto",
    num_speculative_tokens: int = 0,
    max_model_len: int | None = None,
    memory_bytes: int | None = None,
    engine: str = "vllm",
    plugins: Plugins | None = None,
    **options: Any,
) -> Plan:
    """Decide backends, block size, pages and capacity for a model on a platform, without the device.

    :param model: a preset name, a checkpoint directory, a config.json, a dict with its content, or an
        :class:`EngineConfig`, which then says everything else as well.
    :param platform: ``cpu``, ``cuda``, ``xpu`` or a plugin's; it need not be here.
    :param backend: attention backend for every layer; ``None`` takes the platform's first that can serve.
    :param tensor_parallel_size: ranks that share each layer; all sizes of the plan are per rank.
    :param pipeline_parallel_size: stages that the layers are cut into; each has a pool of its own.
    :param data_parallel_size: replicas of the whole model; each serves its own requests.
    :param kv_cache_dtype_skip_layers: attention layers whose K and V stay in the model's dtype.
    :param block_size: tokens of a block, checked and kept; ``None`` finds it in two phases.
    :param mamba_block_size: tokens between kept states in modes ``align`` and ``all``; respected or refused.
    :param max_model_len: longest sequence, in tokens; ``None`` takes the model's.
    :param memory_bytes: memory of the cache on one rank, in bytes; ``None`` plans without capacity, or from
        ``device_memory_bytes``.
    :param engine: whose states are stored: ``vllm`` (a convolution keeps its last K - 1 columns) or
        ``transformers`` (all K columns, recurrent states in float32).
    :param plugins: plugins that were loaded before, for callers that plan often; ``None`` loads them.
    :param options: any other setting of :class:`EngineConfig`'s parts, by its flat name.
    :raises MakereadyError: a named error for every input that cannot be planned.
    """
    given = {
        "platform": platform,
        "backend": backend,
        "tensor_parallel_size": tensor_parallel_size,
        "pipeline_parallel_size": pipeline_parallel_size,
        "data_parallel_size": data_parallel_size,
        "dtype": dtype,
        "kv_cache_dtype": kv_cache_dtype,
        "kv_cache_dtype_skip_layers": kv_cache_dtype_skip_layers,
        "block_size": block_size,
        "mamba_block_size": mamba_block_size,
        "mamba_cache_mode": mamba_cache_mode,
        "mamba_cache_dtype": mamba_cache_dtype,
        "mamba_ssm_cache_dtype": mamba_ssm_cache_dtype,
        "num_speculative_tokens": num_speculative_tokens,
        "max_model_len": max_model_len,
        "memory_bytes": memory_bytes,
        **options,
    }
    if isinstance(model, EngineConfig):
        defaults = {name: parameter.default for name, parameter in signature(plan).parameters.items()}
        given = {name: value for name, value in given.items() if name in options or value != defaults[name]}
    config = _as_config(model, given)
    spec = _read(config, engine)
    plugins = plugins or load_plugins()
    around = _planned_surroundings(config, plugins, engine)
    computed_here = engine == "transformers" or config.attention.mixer_backend != "auto"
    decided, _ = _decide(config, spec, around, _mixers(config, spec, around) if computed_here else None)
    return decided


def prepare(model: Model | EngineConfig | None = None, *, plugins: Plugins | None = None, **options: Any) -> Ready:
    """The engine startup hook: choose the platform and everything after it, allocate the cache, build the backends.

    :param model: a checkpoint directory, or a whole :class:`EngineConfig`; None takes the model that comes with
        the package.
    :param plugins: plugins that were loaded before; ``None`` loads them.
    :param options: as for :func:`plan`.
    :raises MakereadyError: a named error that says what is missing or what clashes; nothing falls back silently.
    """
    config = _as_config(BUNDLED_MODEL if model is None else model, options)
    _require_one_device(config)
    spec = _read(config, "transformers")
    plugins = plugins or load_plugins()
    around = _surroundings_here(config, plugins)
    require_torch()
    mixers = _mixers(config, spec, around)
    decided, backends = _decide(config, spec, around, mixers)
    kernels = None if mixers is None else mixers.backend
    ready = make_ready(config, without_idle_blocks(decided, config), backends, around.device, kernels)
    for note in plugins.engine_startup(ready):
        ready = replace(ready, notes=(*ready.notes, f"{note.plugin}: {note.text}"))
    return ready


def launch(
    model: Model | EngineConfig | None = None,
    prompts: Sequence[str] = ("A function definition",),
    params: SamplingParams | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    plugins: Plugins | None = None,
    **options: Any,
) -> list[Completion]:
    """Generate with the embedded engine on top of :func:`prepare`; one completion per prompt, in order.

    :param model: a checkpoint directory; None takes the model that comes with the package.
    :param params: sampling settings; None is greedy.
    :param options: as for :func:`plan`.
    """
    _refuse_request_options(options)
    config = _as_config(BUNDLED_MODEL if model is None else model, options)
    require_checkpoint(config.model.model)
    require_transformers()
    require_followed(config)
    ready = prepare(config, plugins=plugins)
    require_followed(config, ready.device.device_type)
    from .engines.transformers.launching import open_engine

    engine = open_engine(ready)
    try:
        return engine.generate(prompts, params, on_progress)
    finally:
        engine.close()


def _refuse_request_options(options: Mapping[str, Any]) -> None:
    """Name the place of what is asked of a request and not of the engine."""
    from .engines.transformers.records import SamplingParams

    if "prompt" in options:
        raise ConfigError(
            f"prompt is not an option of launch: give prompts=[{options['prompt']!r}], a list",
            option="prompt",
            value=options["prompt"],
            expected="prompts",
        )
    known = {setting.name for setting in fields(EngineConfig().model)}
    for option in (setting.name for setting in fields(SamplingParams)):
        if option in options and option not in known:
            raise ConfigError(
                f"{option} says how a request is sampled: give params=SamplingParams({option}={options[option]!r}), "
                "from makeready.engines.transformers.records",
                option=option,
                value=options[option],
                expected="params=SamplingParams(...)",
            )


def _as_config(model: Model | EngineConfig, options: Mapping[str, Any]) -> EngineConfig:
    if not isinstance(model, EngineConfig):
        return EngineConfig.from_options(model=model, **options)
    if options:
        raise ConfigError(
            f"options {', '.join(sorted(options))} came beside an EngineConfig; put them into it",
            option=", ".join(sorted(options)),
            value=sorted(options),
            expected="an EngineConfig alone, or a model with options",
        )
    return model.validated()


def _require_one_device(config: EngineConfig) -> None:
    """The embedded engine runs on one device; plans may be for many."""
    parallel = config.parallel
    for option in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
        value = getattr(parallel, option)
        if value > 1:
            raise ConfigError(
                f"{option} {value} can be planned, not launched: the embedded engine runs on one device; use 1, or "
                "makeready plan",
                option=option,
                value=value,
                expected=1,
            )
    if config.cache.free_out_of_window:
        raise ConfigError(
            "free_out_of_window can be planned, not launched: the embedded engine keeps blocks until a request ends",
            option="free_out_of_window",
            value=True,
            expected=False,
        )


def _read(config: EngineConfig, engine: str) -> ModelSpec:
    cache = config.cache
    return read_model(
        config.model.model,
        engine=engine,
        tensor_parallel_size=config.parallel.tensor_parallel_size,
        kv_cache_dtype=cache.kv_cache_dtype,
        kv_cache_dtype_skip_layers=cache.kv_cache_dtype_skip_layers,
        mamba_cache_dtype=cache.mamba_cache_dtype,
        mamba_ssm_cache_dtype=cache.mamba_ssm_cache_dtype,
        num_speculative_tokens=config.scheduler.num_speculative_tokens,
        replay=_replay(config),
        mla_page_alignment=cache.mla_page_alignment,
        dtype=config.model.dtype,
    )


def _replay(config: EngineConfig) -> Replay | None:
    cache = config.cache
    if not cache.use_replayssm:
        return None
    return Replay(
        buffer_len=cache.replayssm_buffer_len,
        backend=cache.mamba_backend,
        mamba_cache_mode=cache.mamba_cache_mode,
    )


def _planned_surroundings(config: EngineConfig, plugins: Plugins, engine: str) -> _Surroundings:
    """A platform by name; its device is only assumed, with everything that the platform and the engine need there."""
    platforms = plannable_platforms(plugins.providers)
    asked = config.device.platform
    if asked is None or asked not in platforms:
        said = "a plan needs a platform" if asked is None else f"platform {asked!r} is not known"
        raise PlatformError(
            f"{said}: give --platform, or platform= in Python, as one of {', '.join(platforms)}",
            option="platform",
            value=asked,
            expected=list(platforms),
        )
    platform = platforms[asked]
    device = DeviceFacts(
        platform=platform.name,
        device_type=platform.device_type,
        memory_bytes=config.device.device_memory_bytes,
        present=False,
    )
    offers = plugins.attention_backends(device)
    mixers = plugins.mixer_backends(device)
    _require_offered(config.attention.asked_backend, offers, auto_may_choose=True)
    return _Surroundings(
        platform=replace(platform, backend_order=platform.planned_order),
        device=device,
        plugins=plugins,
        backends=(*_configured(offers, config, device, engine), *(vllm_backends() if engine == "vllm" else ())),
        mixers=mixers.backends,
        probes=None,
        reasons=(f"platform: {platform.name}, as asked; planned without its device.",),
        refusals=tuple(problem.sentence() for problem in (*plugins.problems, *offers.problems, *mixers.problems)),
    )


def _surroundings_here(config: EngineConfig, plugins: Plugins) -> _Surroundings:
    """The platform that runs on this machine, and every backend's probe on its device."""
    chosen = select_platform(
        plugins.providers,
        config.device.platform,
        plugins.problems,
        device_index=config.device.device_index,
        disabled=plugins.disabled,
    )
    device = chosen.device
    if config.device.device_memory_bytes is not None:
        device = replace(device, memory_bytes=config.device.device_memory_bytes)
    offers = plugins.attention_backends(device)
    mixers = plugins.mixer_backends(device)
    _require_offered(config.attention.asked_backend, offers, auto_may_choose=False)
    backends = _configured(offers, config, device, "transformers")
    others = (candidate for candidate in chosen.candidates if not candidate.chosen)
    return _Surroundings(
        platform=chosen.provider.platform,
        device=device,
        plugins=plugins,
        backends=backends,
        mixers=mixers.backends,
        probes=MappingProxyType({backend.name: backend.probe(device) for backend in backends}),
        reasons=(f"platform: {chosen.provider.name} ({device.name}), {chosen.reason}",),
        refusals=(
            *(f"platform {candidate.name}: {candidate.reason}" for candidate in others),
            *(problem.sentence() for problem in (*plugins.problems, *offers.problems, *mixers.problems)),
        ),
    )


def _configured(
    offers: BackendOffers, config: EngineConfig, device: DeviceFacts, engine: str
) -> tuple[AttentionBackend, ...]:
    """The offered backends, as the user's settings and the engine make them."""
    return tuple(offer.backend.configured(config.attention, device).for_engine(engine) for offer in offers.offered)


def _require_offered(asked: str | None, offers: BackendOffers, *, auto_may_choose: bool) -> None:
    """A plugin whose backends cannot be had is an error where it might have been the one.

    :param auto_may_choose: True where nothing runs: a plan shows the broken plugin among its refusals.
    :raises PluginError: naming the plugins, and how to go on without them.
    """
    known = [offer.backend.name for offer in offers.offered]
    if not offers.problems or asked in known or (asked is None and auto_may_choose):
        return
    broken = ",".join(problem.name for problem in offers.problems)
    wanted = f"backend {asked!r} is not known" if asked is not None else "no backend is chosen beside a broken plugin"
    raise PluginError(
        f"{wanted}: {'; '.join(problem.sentence() for problem in offers.problems)}; repair it, name one of "
        f"{', '.join(known)}, or leave it out with MAKEREADY_DISABLE_PLUGINS={broken}",
        option="backend",
        value=asked,
        expected=known,
    )


def _mixers(config: EngineConfig, spec: ModelSpec, around: _Surroundings) -> ModelMixers | None:
    """The kernels of the model's state layers."""
    offered = tuple(backend.configured(config.attention, around.device) for backend in around.mixers)
    return choose_mixers(
        mixer_requests(spec.layers, spec.dtype),
        offered,
        around.device,
        asked=config.attention.mixer_backend,
        batch_invariant=config.attention.batch_invariant,
        probes=None if around.probes is None else Probes(offered, around.device),
    )


def _decide(
    config: EngineConfig, spec: ModelSpec, around: _Surroundings, mixers: ModelMixers | None
) -> tuple[Plan, Mapping[int, AttentionBackend]]:
    """A backend for every attention layer, then block size, pages and capacity."""
    asks = spec.layer_requests(batch_invariant=config.attention.batch_invariant)
    chosen = choose_backends(
        asks,
        around.backends,
        around.device,
        order=around.platform.backend_order,
        asked=config.attention.asked_backend,
        probes=around.probes,
    )
    preferred = {
        backend.name: backend.get_preferred_block_size(around.device, around.platform.default_block_size)
        for backend in {backend.name: backend for backend in chosen.by_layer.values()}.values()
    }

    def workspace(longest: int) -> int:
        limits = StepLimits(
            max_num_seqs=config.scheduler.max_num_seqs,
            max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
            max_model_len=longest,
        )
        return chosen.workspace_bytes(asks, around.device, limits)

    request = block_size_request(spec, chosen.capabilities, config, preferred_block_sizes=preferred)
    decided = plan_model(
        spec,
        around.platform,
        chosen.capabilities,
        config,
        around.device,
        extra_constraints=(*around.plugins.block_size_constraints(request), *(mixers.constraints if mixers else ())),
        preferred_block_sizes=preferred,
        workspace=workspace if spec.engine == "transformers" else None,
        reasons=(*around.reasons, *chosen.reasons, *(mixers.reasons if mixers else ())),
        refusals=(*around.refusals, *chosen.refusals, *(mixers.refusals if mixers else ())),
    )
    return decided, chosen.by_layer
