"""Configuration fields -> what a state layer keeps per request on one rank, in which dtypes."""

from __future__ import annotations

from ..cache.specs import MambaSpec, StateTensor
from ..config import DTYPES
from ..errors import ConfigError
from .config_fields import ConfigFields
from .families import Family
from .replay_rings import Replay, replay_rings
from .state_shapes import Rank


def state_spec(
    fields: ConfigFields,
    family: Family,
    rank: Rank,
    model_dtype: str,
    mamba_cache_dtype: str,
    mamba_ssm_cache_dtype: str,
    replay: Replay | None = None,
) -> MambaSpec:
    """The state tensors of a family that has a mixer, shapes by the engine's rules.

    :param replay: rings of recent inputs that are kept beside the state; ``None`` for none.
    :raises UnsupportedModelError: if the mixer cannot be split over the ranks.
    :raises ConfigError: for a dtype that the engine or the mixer's kernels cannot have.
    """
    assert family.mixer is not None
    mixer = family.mixer(fields)
    conv = model_dtype if mamba_cache_dtype == "auto" else mamba_cache_dtype
    if rank.engine == "transformers":
        recurrent = model_dtype if family.native_state_dtype else "float32"
        _require_native("mamba_cache_dtype", mamba_cache_dtype, model_dtype)
        if family.native_state_dtype:
            _require_native("mamba_ssm_cache_dtype", mamba_ssm_cache_dtype, recurrent)
        elif mamba_ssm_cache_dtype != "auto":
            recurrent = mamba_ssm_cache_dtype  # mixer kernels store what they are told; the model's own code refuses
        _require_no_speculation(rank)
    else:
        recurrent = _recurrent_dtype(fields, family, mamba_ssm_cache_dtype, conv)
    if recurrent not in family.ssm_dtypes:
        raise ConfigError(
            f"mamba_ssm_cache_dtype {recurrent} is not one that {mixer.kind} kernels take; choose "
            f"{' or '.join(family.ssm_dtypes)}",
            option="mamba_ssm_cache_dtype",
            value=recurrent,
            expected=list(family.ssm_dtypes),
        )
    dtypes = {"conv": conv, "recurrent": recurrent}
    states = [StateTensor(name=name, shape=shape, dtype=dtypes[name]) for name, shape in mixer.shapes(rank)]
    if replay is not None:
        model_type = str(fields.first("model_type"))
        states += replay_rings(replay, model_type, family, mixer, rank, model_dtype)
    return MambaSpec(kind=mixer.kind, states=tuple(states))


def _recurrent_dtype(fields: ConfigFields, family: Family, setting: str, conv: str) -> str:
    """vLLM's rule: the setting, else the configuration's field, else the family's default."""
    if setting not in ("auto", conv) and family.one_state_dtype:
        raise ConfigError(
            f"mamba_ssm_cache_dtype {setting} has no say over this mixer: its state is kept in mamba_cache_dtype, "
            f"{conv}; set that one",
            option="mamba_ssm_cache_dtype",
            value=setting,
            expected=["auto", conv],
        )
    if setting != "auto":
        return setting
    named = fields.first(family.ssm_dtype_field) if family.ssm_dtype_field else None
    if named is not None:
        word = str(named).removeprefix("torch.")
        if word not in DTYPES:
            raise fields.broken(str(family.ssm_dtype_field), named, f"one of {', '.join(DTYPES)}")
        return word
    return conv if family.ssm_dtype == "conv" else family.ssm_dtype


def _require_native(option: str, setting: str, native: str) -> None:
    """transformers decides in which dtype its layers keep states; another one cannot be had."""
    if setting not in ("auto", native):
        raise ConfigError(
            f"{option} {setting} cannot be had: transformers keeps this state in {native}",
            option=option,
            value=setting,
            expected=["auto", native],
        )


def _require_no_speculation(rank: Rank) -> None:
    if rank.speculative:
        raise ConfigError(
            f"num_speculative_tokens {rank.speculative} needs an engine that speculates; states of transformers "
            "keep no room for draft tokens, so use 0",
            option="num_speculative_tokens",
            value=rank.speculative,
            expected=0,
        )
