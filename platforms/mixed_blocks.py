"""vLLM's phase 3: layers that keep the model's dtype beside quantised ones, and the block that each kind gets.

vLLM sizes blocks for the quantised layers, makes them longer until their page covers what a kernel block of the others
takes, and then gives every kind of layer one page size: shorter pages get longer blocks where they divide the longest,
and are padded where they do not. Pure functions; the rules are those of vLLM 0.33.0, see docs/planning.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from ..attention_backends.interface import Capabilities
from ..cache.block_size import AtLeastPage
from ..cache.specs import LATENT_BLOBS, AttentionSpec
from ..errors import CapacityError
from ..hybrid.page_alignment import bytes_per_token
from .decision import BlockSizeRequest
from .kernel_blocks import smallest_kernel_block

OPTION = "kv_cache_dtype_skip_layers"
SKIP_OTHERS = f" or other {OPTION}"


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedBlocks:
    """What each kind of attention layer gets."""

    block_sizes: Mapping[AttentionSpec, int]
    """Tokens of one block."""
    page_bytes: int
    """The one page size of the pool; of the widest layer, where pages keep their own sizes."""
    own_pages: bool
    """True where every page keeps its own size: all layers are full attention and share one block table."""
    reasons: tuple[str, ...]


def phase3_applies(request: BlockSizeRequest) -> bool:
    """Whether some layers keep another dtype, for an engine and a strategy that give each kind its own blocks."""
    return request.quantised_dtype is not None and request.page_strategy == "unified"


def pages_differ(request: BlockSizeRequest, backends: Iterable[Capabilities], block_size: int) -> bool:
    """Whether layers get other pages than blocks were sized for although no block grows for them.

    Skipped layers do where blocks do not grow, packed latents are wider or narrower than that, and windows do not split
    a block that is no kernel block.
    """
    if not phase3_applies(request):
        return False
    if bytes_per_token(_skipped(request)) not in (0, bytes_per_token(quantised(request))):
        return True
    windows = any(spec.sliding_window is not None for spec in request.attention)
    split = any(_longest_kernel_block(backend, block_size) != block_size for backend in backends)
    return bool(request.states) and (request.quantised_dtype in LATENT_BLOBS or (windows and split))


def quantised(request: BlockSizeRequest) -> tuple[AttentionSpec, ...]:
    """The attention layers that blocks are sized for: as if none was skipped, where phase 3 follows.

    vLLM sizes blocks of packed latents as if a latent took one byte per element, whatever a packed one takes.
    """
    if not phase3_applies(request):
        return request.attention
    dtype = "uint8" if request.quantised_dtype in LATENT_BLOBS else str(request.quantised_dtype)
    return tuple(dict.fromkeys(replace(spec, dtype=dtype) for spec in request.attention))


def covering_rule(request: BlockSizeRequest, backends: Iterable[Capabilities]) -> AtLeastPage | None:
    """A quantised page covers one kernel block of the layers that are not quantised; ``None`` if all pages are alike.

    :raises CapacityError: if the layers that are not quantised take less, for which vLLM has no rule.
    """
    narrow, wide = bytes_per_token(quantised(request)), bytes_per_token(_skipped(request))
    if not wide:
        return None
    if wide < narrow:
        raise CapacityError(
            f"{OPTION} is refused: layers in the model's dtype take {wide} bytes a token, fewer than the {narrow} in "
            f"{request.quantised_dtype}, and vLLM widens pages for skipped layers only; quantise all layers, or none",
            option=OPTION,
            value=request.quantised_dtype,
            expected="a kv_cache_dtype that is narrower than the model's",
        )
    if wide == narrow:
        return None
    kernel = max((smallest_kernel_block(backend) for backend in backends), default=1)
    return AtLeastPage(wide * kernel, narrow, owner="a kernel block of the layers that keep the model's dtype")


def mixed_blocks(
    request: BlockSizeRequest, backends: Iterable[Capabilities], block_size: int, *, covered: bool
) -> MixedBlocks:
    """Blocks and the page once ``block_size`` is decided.

    :param covered: whether the block has grown to cover skipped layers; windows are padded to its page then.
    :raises CapacityError: where vLLM cannot bring the pages to one size.
    """
    pages, blocks = _own_pages(request, tuple(backends), block_size, covered)
    windows = [spec for spec in request.attention if spec.sliding_window is not None]
    if not windows and not request.states:
        each = ", ".join(f"{spec.dtype} {pages[spec]} bytes" for spec in pages)
        return MixedBlocks(
            block_sizes=MappingProxyType(blocks),
            page_bytes=max(pages.values()),
            own_pages=True,
            reasons=(
                f"phase 3: one group of blocks of {block_size} tokens, in which every layer keeps its page: {each}.",
            ),
        )
    page = max(*pages.values(), block_size * bytes_per_token(quantised(request)) if request.states else 0)
    said: list[str] = []
    for spec, own in pages.items():
        how = ""
        if own < page and page % own == 0 and (spec.sliding_window is None or not covered):
            blocks[spec] *= page // own
            how = f", {page // own} times as long"
        elif own < page and (spec.mla or page % own == 0):
            raise _not_unified(spec, own, page)
        used = blocks[spec] * spec.bytes_per_token
        padded = f" and padded by {page - used} bytes" if used < page else ""
        said.append(f"{spec.dtype}{' window' if spec.sliding_window else ''} {blocks[spec]} tokens{how}{padded}")
    return MixedBlocks(
        block_sizes=MappingProxyType(blocks),
        page_bytes=page,
        own_pages=False,
        reasons=(f"phase 3: one page of {page} bytes for all layers; blocks: {'; '.join(said)}.",),
    )


def _skipped(request: BlockSizeRequest) -> list[AttentionSpec]:
    return [spec for spec in request.attention if spec.dtype != request.quantised_dtype]


def _own_pages(
    request: BlockSizeRequest, backends: tuple[Capabilities, ...], block_size: int, covered: bool
) -> tuple[dict[AttentionSpec, int], dict[AttentionSpec, int]]:
    """Bytes of each kind's page before all become one, and tokens of its block.

    A window takes the longest kernel block that fits the quantised page and, where that was grown, is padded to it.
    """
    shared = block_size * bytes_per_token(quantised(request))
    pages, blocks = {}, {}
    for spec in request.attention:
        if spec.sliding_window is None:
            blocks[spec], pages[spec] = block_size, spec.page_size_bytes(block_size)
        else:
            most = shared // spec.bytes_per_token if covered else block_size
            blocks[spec] = min(_longest_kernel_block(one, most) for one in backends)
            pages[spec] = shared if covered else spec.page_size_bytes(blocks[spec])
    return pages, blocks


def _longest_kernel_block(backend: Capabilities, most: int) -> int:
    """The longest block, of ``most`` tokens at most, that the kernel need not split; else its shortest."""
    multiple = backend.kernel_block_multiple
    sizes = backend.exact_block_sizes or backend.kernel_block_sizes or (max(multiple, most // multiple * multiple),)
    return max((size for size in sizes if size <= most), default=min(sizes))


def _not_unified(spec: AttentionSpec, own: int, page: int) -> CapacityError:
    why = (
        "they do not divide the largest, and vLLM cannot pad pages of latents"
        if spec.mla
        else "vLLM pads them to that already and cannot bring them to the largest"
    )
    return CapacityError(
        f"kv_cache_dtype {spec.dtype} is refused: {'latents' if spec.mla else 'windows'} in it have pages of {own} "
        f"bytes beside others of {page}: {why}; use another kv_cache_dtype{SKIP_OTHERS}",
        option="kv_cache_dtype",
        value=spec.dtype,
        expected="layers whose pages vLLM can bring to one size",
    )
