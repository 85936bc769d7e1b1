"""Phase 2: what states ask of the KV block, as constraints, and the pages that follow from a block size.

One pool serves attention and states, so that their pages have one size. The attention page has to hold the
largest state; the state page is then padded up to it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ..cache.block_size import AtLeastPage, Constraint, MultipleOf
from ..cache.specs import AttentionSpec, MambaSpec

MLA_ALIGNMENT = 128
"""Tokens: what every known MLA kernel can split."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pages:
    """Pages of a model once its block size is known; all in bytes."""

    attention_bytes_per_token: int
    """Of the widest attention layer; 0 without attention."""
    attention_page_bytes: int
    state_raw_bytes: int
    """Of the largest state; 0 without states."""
    state_page_bytes: int
    """What the largest state takes; 0 without states."""
    page_bytes: int
    """The one page size of the pool; of attention, where states have pages of their own."""
    mamba_page_size_padded: int | None
    """What states are padded to; ``None`` where the largest fills its page, or there are none."""


def bytes_per_token(attention: Iterable[AttentionSpec]) -> int:
    """Bytes that one token takes in the widest layer."""
    return max((spec.bytes_per_token for spec in attention), default=0)


def largest_page(attention: Iterable[AttentionSpec], block_size: int) -> int:
    """Bytes of one block of the widest layer, rounded up as its kernels ask."""
    return max((spec.page_size_bytes(block_size) for spec in attention), default=0)


def largest_state(states: Iterable[MambaSpec]) -> MambaSpec | None:
    """The state with the most bytes; ``None`` without states."""
    return max(states, key=lambda spec: (spec.state_bytes, spec.kind), default=None)


def state_constraints(attention: Iterable[AttentionSpec], states: Iterable[MambaSpec]) -> tuple[Constraint, ...]:
    """What has to hold: one block of attention holds the largest state. Empty unless the model is hybrid."""
    per_token, state = bytes_per_token(attention), largest_state(states)
    if not per_token or state is None:
        return ()
    return (AtLeastPage(state.state_bytes, per_token, owner=f"the {state.kind} state"),)


def alignment_preferences(attention: Iterable[AttentionSpec], phase1_block_size: int) -> tuple[Constraint, ...]:
    """What an automatic choice keeps to on top: a user's own block size need not."""
    wishes: list[Constraint] = [MultipleOf(phase1_block_size, owner="the phase 1 block size")]
    if any(spec.mla for spec in attention):
        wishes.append(MultipleOf(MLA_ALIGNMENT, owner="MLA alignment"))
    return tuple(wishes)


def unified_pages(attention: Collection[AttentionSpec], states: Iterable[MambaSpec], block_size: int) -> Pages:
    """The pages at ``block_size``, which satisfies :func:`state_constraints`."""
    per_token, state = bytes_per_token(attention), largest_state(states)
    raw = state.state_bytes if state is not None else 0
    attention_page = largest_page(attention, block_size)
    page = max(attention_page, raw)
    return Pages(
        attention_bytes_per_token=per_token,
        attention_page_bytes=attention_page,
        state_raw_bytes=raw,
        state_page_bytes=page if state is not None else 0,
        page_bytes=page,
        mamba_page_size_padded=page if state is not None and raw != page else None,
    )


def separate_pages(attention: Collection[AttentionSpec], states: Iterable[MambaSpec], block_size: int) -> Pages:
    """The pages at ``block_size`` where states do not lie in blocks of attention, and are not padded one by one."""
    per_token, state = bytes_per_token(attention), largest_state(states)
    raw = state.state_bytes if state is not None else 0
    return Pages(
        attention_bytes_per_token=per_token,
        attention_page_bytes=largest_page(attention, block_size),
        state_raw_bytes=raw,
        state_page_bytes=raw,
        page_bytes=largest_page(attention, block_size),
        mamba_page_size_padded=None,
    )
