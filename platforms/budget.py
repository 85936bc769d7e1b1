"""From the memory of a rank to blocks and requests, stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ..cache.capacity import Capacity, Holding, plan_capacity
from ..cache.specs import AttentionSpec
from ..config import EngineConfig
from ..device import DeviceFacts, format_bytes
from ..errors import CapacityError
from ..hybrid.model_specs import ModelSpec
from .stages import StagePlan, in_stage

LENGTHS = (512, 4096, 32768, 131072)
"""Request lengths, in tokens, that concurrency is counted for, beside the longest."""


def holding_of(config: EngineConfig) -> Holding:
    """How long blocks are kept. Sliding windows count in full unless the engine is said to free blocks early.

    vLLM keeps a state of its own for every draft token; ReplaySSM verifies all of them from one.
    """
    freeing = config.cache.free_out_of_window
    return Holding(
        mamba_cache_mode=config.cache.mamba_cache_mode,
        frees_out_of_window=freeing,
        in_flight=config.scheduler.max_num_batched_tokens if freeing else 0,
        retained=config.cache.extra_retained_tokens,
        draft_states=0 if config.cache.use_replayssm else config.scheduler.num_speculative_tokens,
    )


def cache_budget(
    model: ModelSpec,
    config: EngineConfig,
    device: DeviceFacts | None,
    reasons: list[str],
    warnings: list[str],
    workspace: Callable[[int], int] | None = None,
) -> int | None:
    """Bytes for the cache on one rank: the setting, or what the device has beside the weights and the workspace.

    :param workspace: bytes that attention kernels take beside the cache, by the longest sequence in tokens; ``None``
        where a host engine's own kernels run.
    """
    if config.cache.memory_bytes is not None:
        taken = _workspace_of(model, config, config.cache.memory_bytes, workspace)
        beside = f"; attention kernels take up to {format_bytes(taken)} beside it" if taken else ""
        reasons.append(f"memory: {format_bytes(config.cache.memory_bytes)} for the cache as the user set{beside}.")
        return config.cache.memory_bytes
    total = config.device.device_memory_bytes or (device.memory_bytes if device is not None else None)
    if total is None:
        return None
    if model.weights_bytes is None:
        warnings.append(
            f"the size of the weights of {model.name} is not known and counts as 0: less of {format_bytes(total)} is "
            "left for the cache; give memory_bytes (--memory), or plan from a checkpoint directory."
        )
    share = int(total * config.cache.memory_fraction)
    ranks = model.tensor_parallel_size * config.parallel.pipeline_parallel_size
    weights = -(-(model.weights_bytes or 0) // ranks)
    known = f"{format_bytes(weights)} of weights" if weights else "weights, whose size is not known and counts as 0"
    taken = _workspace_of(model, config, share - weights, workspace)
    beside = f", and {format_bytes(taken)} that attention kernels take in a step," if taken else ""
    reasons.append(
        f"memory: {config.cache.memory_fraction:g} of {format_bytes(total)} less {known}{beside} leaves "
        f"{format_bytes(max(0, share - weights - taken))} for the cache."
    )
    if weights < share <= weights + taken:
        raise CapacityError(
            f"{config.cache.memory_fraction:g} of the device's {format_bytes(total)} is {format_bytes(share)}, the "
            f"weights take {format_bytes(weights)} and attention kernels up to {format_bytes(taken)} in a step; use "
            "more memory, or a smaller max_model_len, max_num_batched_tokens or max_num_seqs",
            option="memory_fraction",
            value=config.cache.memory_fraction,
            expected=f"more than {weights + taken} bytes",
        )
    if share <= weights:
        raise CapacityError(
            f"{config.cache.memory_fraction:g} of the device's {format_bytes(total)} is {format_bytes(share)}, and the "
            f"weights alone take {format_bytes(weights)}; use more memory, more ranks or a smaller model",
            option="memory_fraction",
            value=config.cache.memory_fraction,
            expected=f"more than {weights} bytes",
        )
    return share - weights - taken


def _workspace_of(
    model: ModelSpec, config: EngineConfig, available: int, workspace: Callable[[int], int] | None
) -> int:
    """Bytes of the kernels' workspace, for sequences that are no longer than what ``available`` bytes can hold."""
    if workspace is None or available <= 0:
        return 0
    specs = [layer.spec for layer in model.layers if isinstance(layer.spec, AttentionSpec)]
    per_token = sum(spec.bytes_per_token for spec in specs) // config.parallel.pipeline_parallel_size
    longest = min(config.model.max_model_len or model.max_model_len, max(1, available // max(1, per_token)))
    return workspace(longest)


def with_capacities(
    stages: Sequence[StagePlan],
    config: EngineConfig,
    budget: int | None,
    num_blocks: Sequence[int] | int | None,
    max_model_len: int,
) -> tuple[StagePlan, ...]:
    """The stages, each with what fits into its own pool; unchanged where neither a budget nor blocks are known.

    :param num_blocks: blocks of the pool, of every stage or of each.
    :raises CapacityError: if one request cannot fit, naming the stage where there are several.
    """
    if budget is None and num_blocks is None:
        return tuple(stages)
    counts = [num_blocks] * len(stages) if num_blocks is None or isinstance(num_blocks, int) else num_blocks
    found = []
    for stage, count in zip(stages, counts, strict=True):
        if not stage.groups:
            found.append(stage)
            continue
        try:
            found.append(replace(stage, capacity=_count(stage, config, budget, count, max_model_len)))
        except CapacityError as error:
            if len(stages) == 1:
                raise
            raise in_stage(error, stage.name) from None
    return tuple(found)


def served_max_model_len(
    config: EngineConfig,
    capacity: Capacity | None,
    stages: Sequence[StagePlan],
    max_model_len: int,
    warnings: list[str],
) -> int:
    """The longest request: what the user asked for has to fit, the model's own maximum is cut to what fits."""
    if capacity is None or capacity.max_tokens >= max_model_len:
        return max_model_len
    holding = holding_of(config)
    tight = next(x for x in stages if x.capacity is not None and x.capacity.max_tokens == capacity.max_tokens)
    assert tight.capacity is not None
    needed = holding.request_bytes(tight.groups, tight.shape, max_model_len)
    where = f" in {tight.name}" if len(stages) > 1 else ""
    if config.model.max_model_len is not None:
        raise CapacityError(
            f"one request of max_model_len {max_model_len} needs {format_bytes(needed)} ({needed} bytes) of cache"
            f"{where}, and there are {format_bytes(tight.capacity.memory_bytes)}; the longest that fits is "
            f"{capacity.max_tokens}",
            option="max_model_len",
            value=max_model_len,
            expected=f"<= {capacity.max_tokens}",
        )
    warnings.append(
        f"one request of the model's {max_model_len} tokens would need {format_bytes(needed)}{where}; the longest that "
        f"fits and is served is {capacity.max_tokens}."
    )
    return capacity.max_tokens


def _count(
    stage: StagePlan, config: EngineConfig, budget: int | None, num_blocks: int | None, max_model_len: int
) -> Capacity:
    _require_blocks_to_fit(stage.shape.block_bytes, config)
    return plan_capacity(
        stage.groups,
        stage.shape,
        memory_bytes=budget,
        num_blocks=num_blocks,
        lengths=tuple(sorted({n for n in (*LENGTHS, max_model_len) if n <= max_model_len})),
        max_model_len=max_model_len,
        holding=holding_of(config),
    )


def _require_blocks_to_fit(block_bytes: int, config: EngineConfig) -> None:
    """Blocks that the user counts need no more than the memory that the user names, if both are there."""
    asked, said = config.cache.num_blocks, ("memory_bytes", config.cache.memory_bytes)
    if said[1] is None:
        said = ("device_memory_bytes", config.device.device_memory_bytes)
    if asked is None or said[1] is None or asked * block_bytes <= said[1]:
        return
    raise CapacityError(
        f"num_blocks {asked} of {format_bytes(block_bytes)} take {format_bytes(asked * block_bytes)}, and {said[0]} is "
        f"{format_bytes(said[1])}: {said[1] // block_bytes} blocks fit; leave one of them out",
        option="num_blocks",
        value=asked,
        expected=f"<= {said[1] // block_bytes}",
    )
