"""Attention layers whose K and V take different memory, in one pool with one page size: padded, or refused."""

from __future__ import annotations

from collections import Counter

from ..cache.specs import AttentionSpec
from ..errors import CapacityError
from ..hybrid.model_specs import ModelSpec
from .decision import BlockSizeDecision

LARGEST_PADDED_SHARE = 1 / 2
"""Share of all attention pages that layers of several KV dtypes may leave empty under unified pages."""


def page_sizes_differ(model: ModelSpec) -> bool:
    """Whether some attention layers take more bytes per token than others."""
    return len({spec.bytes_per_token for spec in _counts(model)}) > 1


def padded_attention(model: ModelSpec, decision: BlockSizeDecision) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What it costs that every attention page is as large as the widest: reasons, and warnings.

    :raises CapacityError: if several KV dtypes leave more than :data:`LARGEST_PADDED_SHARE` of the pages empty.
    """
    if not page_sizes_differ(model):
        return (), ()
    counts = _counts(model)
    page, size = decision.attention_page_bytes, decision.block_size
    filled = sum(count * spec.page_size_bytes(size) for spec, count in counts.items())
    empty = 1 - filled / (page * counts.total())
    said = "; ".join(_kind(spec, count, size, page) for spec, count in counts.items())
    if len({spec.dtype for spec in counts}) > 1 and empty > LARGEST_PADDED_SHARE:
        raise CapacityError(
            f"page_strategy unified gives every attention layer pages of {page} bytes, and would leave {empty:.1%} of "
            f"them empty, more than half: {said}; use page_strategy subdivided, or one KV dtype",
            option="page_strategy",
            value="unified",
            expected="subdivided",
        )
    warnings = [f"attention pages of {page} bytes, as the widest layers need, are empty by {empty:.1%}: {said}."]
    if model.engine == "vllm":
        warnings.append(
            "no setting of engine vllm gives layers such KV dtypes and widths; this plan pads all pages to the widest."
        )
    return (f"attention pages: one size, {page} bytes, for all layers: {said}.",), tuple(warnings)


def _kind(spec: AttentionSpec, count: int, size: int, page: int) -> str:
    own = spec.page_size_bytes(size)
    return f"{count} x {spec.dtype} fill {own} bytes" + (f", padded by {page - own}" if own < page else "")


def _counts(model: ModelSpec) -> Counter[AttentionSpec]:
    return Counter(layer.spec for layer in model.attention_layers if isinstance(layer.spec, AttentionSpec))
