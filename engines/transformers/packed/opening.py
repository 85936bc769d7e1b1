"""From decisions to a running packed model."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from ..execution import Execution
from ..families import Traits
from ..records import Ready
from .compiling import CompiledLayers
from .runner import PackedRunner

SEVERAL = {"triton.enable_pdl": True}
"""Of Inductor: a kernel is set up while the one before it ends, as ours are (:mod:`makeready.early_launch`)."""
ONE_TOKEN = {**SEVERAL, "combo_kernels": True}
"""Where a step is many tiny kernels, those that do not depend on each other share a launch, too."""


def open_packed(model: Any, ready: Ready, traits: Traits, execution: Execution) -> PackedRunner:
    """The runner that ``execution`` asks for, with its graphs captured."""
    compiled = _compiled(model.device.type) if execution.compile_layers else None
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


def _compiled(device_type: str) -> CompiledLayers:
    if device_type != "cuda":
        return CompiledLayers()
    return CompiledLayers(options=_known(SEVERAL), one_token=_known(ONE_TOKEN))


def _known(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those that this torch has; 2.8 launches nothing programmatically."""
    from torch._inductor import list_options

    known = frozenset(list_options())
    return {name: value for name, value in options.items() if name in known}
