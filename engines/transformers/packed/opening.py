"""From decisions to a running packed model."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from ..execution import Execution
from ..families import Traits
from ..records import Ready
from .compiling import CompiledLayers
from .runner import PackedRunner

ONE_TOKEN = {"combo_kernels": True}
"""Of Inductor, where a step is many tiny kernels: those that do not depend on each other share a launch."""


def open_packed(model: Any, ready: Ready, traits: Traits, execution: Execution) -> PackedRunner:
    """The runner that ``execution`` asks for, with its graphs captured."""
    options = ONE_TOKEN if model.device.type == "cuda" else None
    compiled = CompiledLayers(one_token=options) if execution.compile_layers else None
    runner = PackedRunner(
        model,
        ready,
        traits,
        execution.kernels,
        compiled,
        limits=compiled.limits if compiled else nullcontext,
        cuda_graphs=execution.cuda_graphs,
        prefill_graphs=execution.prefill_graphs,
    )
    try:
        runner.warm_up()
    except BaseException:
        runner.close()
        raise
    return runner
