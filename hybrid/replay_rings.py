"""ReplaySSM: rings of recent inputs that vLLM keeps beside a mamba2 state, so that it stores the state less often.

vLLM 0.33 has them for one family (nemotron_h), off by default. They lie in the state page, after the recurrent state.
"""

from __future__ import annotations

from typing import NamedTuple

from ..cache.specs import StateTensor
from ..errors import ConfigError
from .families import FAMILIES, Family
from .state_shapes import Mamba2, Mixer, Rank

FLASHINFER_MOST = 16
"""Rows of history that FlashInfer's kernel takes at most."""


class Replay(NamedTuple):
    """The rings as the user set them."""

    buffer_len: int = 16
    """Tokens of history."""
    backend: str = "triton"
    """Whose mamba2 kernels: ``triton`` or ``flashinfer``."""
    mamba_cache_mode: str = "none"

    def rows(self, speculative: int) -> int:
        """Tokens that a ring has room for: FlashInfer keeps those that are being verified in the ring as well."""
        return self.buffer_len + (1 + speculative if self.backend == "flashinfer" else 0)


def replay_rings(
    replay: Replay, model_type: str, family: Family, mixer: Mixer, rank: Rank, model_dtype: str
) -> tuple[StateTensor, ...]:
    """The three rings of a layer on one rank: x and B in the dtype of activations, dt in float32.

    :raises ConfigError: where vLLM refuses them, by the setting that stands against it.
    """
    _check(replay, model_type, family, rank)
    assert isinstance(mixer, Mamba2)
    rows, (_, (_, (heads, head_dim, state_size))) = replay.rows(rank.speculative), mixer.shapes(rank)
    return (
        StateTensor(name="replay_x", shape=(heads, rows, head_dim), dtype=model_dtype),
        StateTensor(name="replay_dt", shape=(heads, rows), dtype="float32"),
        StateTensor(name="replay_B", shape=(mixer.groups_of(rank), rows, state_size), dtype=model_dtype),
    )


def without_states(model_type: str) -> ConfigError:
    """The refusal of rings for a family that has no states."""
    return _refused(f"a {model_type} has no mamba2 states that rings could stand beside", False)


def _check(replay: Replay, model_type: str, family: Family, rank: Rank) -> None:
    if rank.engine != "vllm":
        raise _refused(f"engine {rank.engine} keeps no rings; they are vLLM's", "engine vllm")
    if not family.replay:
        known = [name for name, one in FAMILIES.items() if one.replay]
        raise _refused(f"vLLM keeps rings for {', '.join(known)} only, and the model is a {model_type}", known)
    window = 1 + rank.speculative
    if replay.backend == "flashinfer":
        if replay.buffer_len > FLASHINFER_MOST:
            raise _refused(
                f"replayssm_buffer_len {replay.buffer_len} is more than the {FLASHINFER_MOST} that mamba_backend "
                "flashinfer takes",
                f"<= {FLASHINFER_MOST}",
                "replayssm_buffer_len",
                replay.buffer_len,
            )
        if replay.mamba_cache_mode != "none":
            raise _refused(
                f"mamba_backend flashinfer keeps no states at block boundaries, and mamba_cache_mode is "
                f"{replay.mamba_cache_mode}",
                "mamba_cache_mode none, or mamba_backend triton without speculation",
            )
        if rank.speculative and replay.buffer_len < window:
            raise _refused(
                f"replayssm_buffer_len {replay.buffer_len} is less than the {window} tokens that "
                f"num_speculative_tokens {rank.speculative} verifies at a time",
                f">= {window}",
                "replayssm_buffer_len",
                replay.buffer_len,
            )
    elif rank.speculative:
        raise _refused(
            f"num_speculative_tokens {rank.speculative} is verified against rings by mamba_backend flashinfer only, "
            f"and it is {replay.backend}",
            "mamba_backend flashinfer, or num_speculative_tokens 0",
        )


def _refused(why: str, expected: object, option: str = "use_replayssm", value: object = True) -> ConfigError:
    return ConfigError(f"use_replayssm is refused: {why}", option=option, value=value, expected=expected)
