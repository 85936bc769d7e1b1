"""The sizes that a built flex uses, checked once, with both numbers in every refusal. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from ...cache.specs import AttentionSpec
from ...config import LEAST_FLEX_BLOCK, AttentionConfig
from ...device import DeviceFacts
from ...errors import BackendError
from ..interface import BuildRequest, Capabilities
from .tiles import FEWEST_ROWS, INVARIANT_ROWS, ORDINARY_QUERY_BLOCK, decode_tile

KERNEL_BLOCKS = (16, 32, 64, 128)
"""KV blocks to choose from: the planner takes the largest that divides the block. Powers of two, as Triton asks."""
SHORT_ROW = 16
"""Query rows of a draft to verify or a short prompt, padded to this length."""
CPU_ROW = 64
IN_FLIGHT = 2
"""Steps whose block lists may be alive at the same time."""
_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class FlexSettings:
    """Every size that decides which kernels get compiled, and how large their buffers are."""

    device: DeviceFacts
    block_size: int
    kernel_block_size: int
    """KV block of the block mask, in tokens."""
    mask_query_block: int
    """Query block of the block mask, in tokens."""
    order_kv_block: int
    """KV block of the mask whose order rows keep under batch invariance, in tokens; of kernel blocks."""
    row_lengths: tuple[int, ...]
    """Query tokens of one row of a batch, ascending; a longer query takes several rows."""
    row_step: int
    """Batches are padded to powers of this many rows; padding rows visit no block."""
    max_blocks_per_row: int
    """Kernel blocks of the longest sequence."""
    tile_m: int | None
    """The user's kernel tiles, or ``None`` for those chosen by dtype and head size."""
    tile_n: int | None
    asked_query_block: int | None
    """The user's mask blocks, or ``None`` for those that suit the kernel."""
    asked_kv_block: int | None
    sinks: bool
    max_view_elements: int | None
    batch_invariant: bool
    num_kv_heads: int
    group_size: int
    """Query heads a KV head."""
    head_size: int
    head_size_v: int
    element_bytes: int
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int

    @property
    def on_cpu(self) -> bool:
        """True for torch's C++ template, which chooses its own tiles."""
        return self.device.device_type == "cpu"

    @property
    def fused(self) -> bool:
        """True where Triton kernels of our own surround torch's: block lists on the device, splits, graphs."""
        return self.device.device_type == "cuda"

    @property
    def order(self) -> tuple[int, int] | None:
        """(query, KV) block of the mask over a whole sequence whose order all rows keep: under batch invariance."""
        return (self.mask_query_block, self.order_kv_block) if self.batch_invariant else None

    @property
    def align(self) -> int:
        """Query rows start at multiples of this position: under batch invariance, where a training pass has them."""
        return self.mask_query_block if self.batch_invariant else 1

    @property
    def extra_rows(self) -> int:
        """Rows that splits of long requests may take beside one row a request."""
        if self.batch_invariant:
            return 0
        return -(-decode_tile(self.head_size, self.element_bytes, self.kernel_block_size).programs // self.num_kv_heads)

    @property
    def max_decode_rows(self) -> int:
        """Rows of the largest step of decodes."""
        return max(self.max_num_seqs + self.extra_rows, FEWEST_ROWS)

    @property
    def list_columns(self) -> tuple[int, int]:
        """Columns of a row's list of whole blocks and of masked ones, a sentinel in each; multiples of 16 bytes."""
        tile = self.mask_query_block + self.order_kv_block if self.batch_invariant else max(self.group_size, 64)
        edges = 2 * (tile // self.kernel_block_size + 3)
        return _up(self.max_blocks_per_row + 1, 4), _up(edges + 1, 4)

    @property
    def buffer_bytes(self) -> int:
        """Bytes of one kind of layer's persistent block lists and row facts, all steps in flight."""
        if not self.fused:
            return 0
        rows, columns = self.max_decode_rows, sum(self.list_columns)
        numbers = rows * (columns + 2 + 7) + self.max_num_seqs + 1 + self.num_blocks + 1
        return IN_FLIGHT * 4 * numbers

    @property
    def run_tokens(self) -> int:
        """Tokens of the largest run that long queries gather K and V into: one sequence, or a few steps' prompts."""
        return _up(max(self.max_model_len, 4 * self.max_num_batched_tokens), 128)

    @property
    def run_bytes(self) -> int:
        """Bytes of that run; one layer at a time has it."""
        width = self.num_kv_heads * (self.head_size + self.head_size_v) * self.element_bytes
        return self.run_tokens * width if self.fused and not self.batch_invariant else 0

    def batch_rows(self, rows: int) -> int:
        """``rows`` padded to a compiled batch size; where rows are symbolic, only one row is a size of its own."""
        if self.fused:
            return max(rows, FEWEST_ROWS)
        size = self.row_step if self.on_cpu else 1
        while size < rows:
            size *= self.row_step
        return size


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def flex_settings(request: BuildRequest, capabilities: Capabilities) -> FlexSettings:
    """The settings of a build.

    :raises BackendError: when a block, a tile, a dtype or the cache's size is outside what flex can serve.
    """
    on_cpu = request.device.device_type == "cpu"
    config, spec = request.config, request.spec
    invariant = config.batch_invariant
    kernel_block = _kernel_block(request)
    _check_dtypes(request, capabilities)
    group = spec.num_query_heads // spec.num_kv_heads
    tile_m, tile_n = config.flex_attn_block_m, config.flex_attn_block_n
    query_block = config.flex_attn_q_block_size or ORDINARY_QUERY_BLOCK
    if invariant:
        query_block = invariant_query_block(config, on_cpu=on_cpu)
    check_layer(config, spec, request.device, invariant=capabilities.batch_invariant)
    _check_tiles(config, kernel_block, query_block)
    _check_address_range(request, capabilities)
    longest = config.flex_attn_q_block_size or (CPU_ROW if on_cpu else ORDINARY_QUERY_BLOCK)
    lengths = {1, min(SHORT_ROW, longest), longest}
    if invariant:
        lengths = {query_block}
    blocks = -(-request.max_model_len // request.block_size)
    return FlexSettings(
        device=request.device,
        block_size=request.block_size,
        kernel_block_size=kernel_block,
        mask_query_block=query_block,
        order_kv_block=invariant_kv_block(config, kernel_block, on_cpu=on_cpu),
        row_lengths=tuple(sorted(lengths)),
        row_step=8 if on_cpu else 2,
        max_blocks_per_row=blocks * (request.block_size // kernel_block),
        tile_m=tile_m,
        tile_n=tile_n,
        asked_query_block=config.flex_attn_q_block_size,
        asked_kv_block=config.flex_attn_kv_block_size,
        sinks=capabilities.sinks,
        max_view_elements=capabilities.max_view_elements,
        batch_invariant=invariant,
        num_kv_heads=spec.num_kv_heads,
        group_size=group,
        head_size=spec.head_size,
        head_size_v=spec.head_size_v,
        element_bytes=_ELEMENT_BYTES[request.dtype],
        num_blocks=request.num_blocks,
        max_num_seqs=request.max_num_seqs,
        max_num_batched_tokens=request.max_num_batched_tokens,
        max_model_len=request.max_model_len,
    )


def invariant_query_block(config: AttentionConfig, *, on_cpu: bool) -> int:
    """Query block under batch invariance; on CPU, where every row of queries is padded to it, the least."""
    return config.flex_attn_q_block_size or (SHORT_ROW if on_cpu else ORDINARY_QUERY_BLOCK)


def invariant_kv_block(config: AttentionConfig, kernel_block: int, *, on_cpu: bool) -> int:
    """KV block whose order rows keep: on CUDA 128, which torch's backward kernels can divide too."""
    asked = config.flex_attn_kv_block_size
    return asked or (kernel_block if on_cpu else max(kernel_block, ORDINARY_QUERY_BLOCK))


def check_layer(config: AttentionConfig, spec: AttentionSpec, device: DeviceFacts, *, invariant: bool) -> None:
    """What a plan knows already: tiles that the device cannot follow, and query heads that no tile holds.

    :param invariant: whether the backend can promise the same bits in every batch on ``device``.
    :raises BackendError: with the setting, or the heads, that clash.
    """
    if config.batch_invariant and not invariant:
        raise BackendError(
            f"flex on {device.device_type} cannot promise the same bits in every batch",
            option="batch_invariant",
            value=True,
            expected=False,
        )
    for option in ("flex_attn_block_m", "flex_attn_block_n"):
        tile = getattr(config, option)
        if tile is not None and device.device_type == "cpu":
            raise BackendError(
                f"{option} {tile} cannot be respected on CPU: torch's C++ kernel chooses its own tiles",
                option=option,
                value=tile,
                expected="unset",
            )
    columns = config.flex_attn_block_n or 0
    if columns > KERNEL_BLOCKS[-1] and config.flex_attn_kv_block_size is None:
        raise BackendError(
            f"flex_attn_block_n {columns} is more than the {KERNEL_BLOCKS[-1]} tokens of the largest KV block that is "
            f"chosen; set flex_attn_kv_block_size {columns} as well",
            option="flex_attn_block_n",
            value=columns,
            expected=f"<= {KERNEL_BLOCKS[-1]}, or flex_attn_kv_block_size",
        )
    if device.device_type != "cpu":
        _check_group(config, spec.num_query_heads // spec.num_kv_heads)


def _check_group(config: AttentionConfig, group: int) -> None:
    """Decoding packs the query heads of a KV head into one tile; under batch invariance into that of a prefill."""
    block = config.flex_attn_q_block_size or ORDINARY_QUERY_BLOCK
    if block < max(SHORT_ROW, group):
        raise BackendError(
            f"flex_attn_q_block_size {block} is smaller than {max(SHORT_ROW, group)}, "
            f"the rows that decoding packs into one tile for {group} query heads a KV head",
            option="flex_attn_q_block_size",
            value=block,
            expected=f">= {max(SHORT_ROW, group)}",
        )
    tile = config.flex_attn_block_m or min(block, INVARIANT_ROWS)
    if config.batch_invariant and group > tile:
        raise BackendError(
            f"flex_attn_block_m {tile} is smaller than the {group} query heads of a KV head, which one tile of a "
            "decode must hold for its bits to be those of a prefill",
            option="flex_attn_block_m",
            value=tile,
            expected=f">= {group}",
        )


def _kernel_block(request: BuildRequest) -> int:
    """The user's KV block where given, else the planner's; it divides the block."""
    wanted = request.config.flex_attn_kv_block_size
    size = wanted or request.kernel_block_size
    option = "flex_attn_kv_block_size" if wanted else "kernel_block_size"
    fitting = [block for block in KERNEL_BLOCKS if request.block_size % block == 0]
    if request.block_size % size:
        raise BackendError(
            f"{option} {size} does not divide the block size {request.block_size}; "
            f"what does: {', '.join(map(str, fitting)) or 'none of ' + str(KERNEL_BLOCKS)}",
            option=option,
            value=size,
            expected=fitting,
        )
    if size < KERNEL_BLOCKS[0] or size & (size - 1):
        raise BackendError(
            f"{option} {size} is not a power of two of at least {KERNEL_BLOCKS[0]}, which flex's kernels need",
            option=option,
            value=size,
            expected=fitting,
        )
    return size


def _check_dtypes(request: BuildRequest, capabilities: Capabilities) -> None:
    if request.device.device_type not in ("cpu", "cuda", "xpu", "hpu", "mps"):
        raise BackendError(
            f"flex cannot serve {request.device.platform}: torch's flex_attention refuses device type "
            f"{request.device.device_type}",
            option="backend",
            value="flex",
        )
    if request.dtype not in capabilities.dtypes:
        raise BackendError(
            f"flex computes in {', '.join(sorted(capabilities.dtypes))}, not {request.dtype}",
            option="dtype",
            value=request.dtype,
            expected=sorted(capabilities.dtypes),
        )
    if request.spec.dtype != request.dtype:
        raise BackendError(
            f"flex needs K and V in the queries' dtype {request.dtype}, and the cache holds {request.spec.dtype}",
            option="kv_cache_dtype",
            value=request.spec.dtype,
            expected=request.dtype,
        )


def _check_tiles(config: AttentionConfig, kernel_block: int, query_block: int) -> None:
    tiles = (
        ("flex_attn_block_m", config.flex_attn_block_m, "flex_attn_q_block_size", query_block),
        ("flex_attn_block_n", config.flex_attn_block_n, "KV block", kernel_block),
    )
    for option, tile, block_name, block in tiles:
        if tile is not None and (tile < LEAST_FLEX_BLOCK or block % tile):
            raise BackendError(
                f"{option} {tile} must be at least {LEAST_FLEX_BLOCK} and divide the {block_name} {block}",
                option=option,
                value=tile,
                expected=f"a divisor of {block}, {LEAST_FLEX_BLOCK} or more",
            )


def _check_address_range(request: BuildRequest, capabilities: Capabilities) -> None:
    """K and V of a layer lie in the same pages, so the view of K spans V too."""
    spec, limit = request.spec, capabilities.max_view_elements
    per_token = spec.num_kv_heads * (spec.head_size + spec.head_size_v)
    elements = request.num_blocks * request.block_size * per_token
    if limit is not None and not spec.mla and elements > limit:
        fits = limit // (request.block_size * per_token)
        raise BackendError(
            f"a layer of {request.num_blocks} blocks spans {elements} elements, and flex on "
            f"{request.device.device_type} addresses {limit}; {fits} blocks fit",
            option="num_blocks",
            value=request.num_blocks,
            expected=f"<= {fits}",
        )
