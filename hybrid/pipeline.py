"""Pipeline stages: which layers of a model each stage has."""

from __future__ import annotations

from ..errors import ConfigError


def stage_layers(num_layers: int, stages: int) -> tuple[range, ...]:
    """Cut ``num_layers`` layers into contiguous stages, by vLLM's default rule.

    Every stage has ``num_layers // stages`` layers. What is left over goes, one each, to the stages before the last,
    counted from the back: the last stage also has the output head, and the first comes last in this order since it
    also has the embedding. 10 layers in 4 stages are 2, 3, 3 and 2.

    :return: per stage the indices of its layers.
    :raises ConfigError: if a stage would have no layer.
    """
    if stages > num_layers:
        raise ConfigError(
            f"pipeline_parallel_size {stages} is more than the model's {num_layers} layers; a stage needs one at least",
            option="pipeline_parallel_size",
            value=stages,
            expected=f"<= {num_layers}",
        )
    least, left = divmod(num_layers, stages)
    found, start = [], 0
    for stage in range(stages):
        from_back = stages - 1 - stage
        count = least + (1 <= from_back <= left)
        found.append(range(start, start + count))
        start += count
    return tuple(found)
