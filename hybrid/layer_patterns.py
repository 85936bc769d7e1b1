"""What each layer of a model holds, from the many ways in which configurations say it."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType

from ..errors import ModelConfigError
from .config_fields import ConfigFields


class LayerKind(Enum):
    """What one layer keeps in the cache."""

    STATE = "state"
    ATTENTION = "attention"
    SLIDING = "sliding"
    BOTH = "both"
    BOTH_SLIDING = "both_sliding"
    NOTHING = "nothing"


_S, _A, _W, _B, _BW, _N = LayerKind

WORDS: Mapping[str, LayerKind] = MappingProxyType({
    "linear_attention": _S, "mamba": _S, "mamba2": _S, "conv": _S, "recurrent": _S,
    "full_attention": _A, "attention": _A,
    "sliding_attention": _W,
    "hybrid": _B, "hybrid_sliding": _BW,
    "mlp": _N, "moe": _N, "dense": _N, "sparse": _N, "cross_attention": _N, "gated_memory": _N,
})  # fmt: skip
"""Words of layer lists. Cross attention and gated memory units read another layer's cache and keep nothing."""

PATTERN: Mapping[str, LayerKind] = MappingProxyType({"M": _S, "*": _A, "-": _N, "E": _N})
"""Letters of ``hybrid_override_pattern``."""

LISTS = ("layer_types", "layers_block_type")


def explicit_layers(fields: ConfigFields) -> tuple[LayerKind, ...] | None:
    """The layers that the configuration lists, or ``None`` where it lists none.

    :raises ModelConfigError: for an unknown word, or a list whose length is not ``num_hidden_layers``.
    """
    name = next((name for name in LISTS if fields.has(name)), None)
    if name is not None:
        layers = tuple(_word(fields, name, word) for word in fields.texts(name))
    elif fields.has("hybrid_override_pattern"):
        name = "hybrid_override_pattern"
        layers = tuple(_letter(fields, letter) for letter in str(fields.values[name]))
    else:
        return None
    stated = fields.integer("num_hidden_layers", default=len(layers))
    if stated != len(layers) or not layers:
        raise ModelConfigError(
            f"{fields.source}: {name} names {len(layers)} layers but num_hidden_layers is {stated}",
            option=name,
            value=len(layers),
            expected=stated,
        )
    return layers


def all_of(kind: LayerKind, fields: ConfigFields) -> tuple[LayerKind, ...]:
    """Every layer the same."""
    return (kind,) * fields.integer("num_hidden_layers")


def every(fields: ConfigFields, period: int, offset: int, at: LayerKind, rest: LayerKind) -> tuple[LayerKind, ...]:
    """``at`` in layers whose index leaves ``offset`` when divided by ``period``, else ``rest``."""
    count = fields.integer("num_hidden_layers")
    return tuple(at if i % period == offset else rest for i in range(count))


def attention_at(fields: ConfigFields, indices: tuple[int, ...], *, name: str, base: int = 0) -> tuple[LayerKind, ...]:
    """Attention in the layers ``indices``, counted from ``base``; states in all others.

    :raises ModelConfigError: for an index that is no layer.
    """
    count = fields.integer("num_hidden_layers")
    wrong = [i for i in indices if not base <= i < count + base]
    if wrong:
        raise fields.broken(name, list(indices), f"indices from {base} to {count - 1 + base}")
    return tuple(_A if i + base in indices else _S for i in range(count))


def _word(fields: ConfigFields, name: str, word: str) -> LayerKind:
    if word not in WORDS:
        raise fields.broken(name, word, f"one of {', '.join(WORDS)}")
    return WORDS[word]


def _letter(fields: ConfigFields, letter: str) -> LayerKind:
    if letter not in PATTERN:
        raise fields.broken("hybrid_override_pattern", letter, f"letters out of {' '.join(PATTERN)}")
    return PATTERN[letter]
