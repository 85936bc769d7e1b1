"""Settings that the embedded engine cannot follow, said before a cache is allocated or weights are loaded. No torch."""

from __future__ import annotations

from ..config import EngineConfig
from ..errors import ConfigError

PACKED_ONLY: tuple[str, ...] = ("cuda_graphs", "compile_layers", "async_scheduling")
"""Settings of packed steps alone."""


def require_followed(config: EngineConfig, device_type: str | None = None) -> None:
    """Refuse what no checkpoint would change.

    :param device_type: where the model will be; None as long as it is not known, when ``cuda_graphs`` waits: the
        device is what stands first in its way.
    :raises ConfigError: naming both sides of the clash.
    """
    mode = config.cache.mamba_cache_mode
    if mode != "none":
        raise ConfigError(
            f"mamba_cache_mode {mode!r} keeps states at block boundaries, for prefix caching, which the embedded"
            " engine does not do; use 'none'",
            option="mamba_cache_mode", value=mode, expected="none",
        )  # fmt: skip
    asked, mixers = config.execution, config.attention.mixer_backend
    if asked.cuda_graphs and device_type not in (None, "cuda"):
        raise ConfigError(
            f"{switch('cuda_graphs')} needs a CUDA device, and the model is on {device_type}; leave it out",
            option="cuda_graphs", value=True, expected=False,
        )  # fmt: skip
    if asked.packed_steps is not False:
        return
    if mixers != "auto":
        raise ConfigError(
            f"mixer_backend {mixers!r} computes the state layers of packed steps, and "
            f"{switch('packed_steps', False)} turns those off; leave one of the two out",
            option="packed_steps", value=False, expected=True,
        )  # fmt: skip
    for option in PACKED_ONLY:
        if getattr(asked, option) and (device_type is not None or option != "cuda_graphs"):
            raise ConfigError(
                f"{switch(option)} needs packed steps, and {switch('packed_steps', False)} turns those off; leave one "
                "of the two out",
                option=option, value=True, expected=False,
            )  # fmt: skip


def switch(option: str, value: bool = True) -> str:
    """An execution setting as it is written: on the command line, and in Python."""
    return f"--{'' if value else 'no-'}{option.replace('_', '-')} ({option}={value})"
