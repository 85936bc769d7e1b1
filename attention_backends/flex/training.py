"""The serving side's numbers for a trainer: the block mask and the kernel options of plain flex_attention.

Under batch invariance a query's bits depend on its own request alone: on the tile it is computed with, and on the
order in which it meets its blocks of keys (ragged ones first, then the whole ones). With the same tile and order, a
full forward pass over unpaged K and V gives the same bits::

    kernel = training_kernel(head_size=128, dtype="bfloat16", kernel_block_size=16, device_type="cuda")
    out = torch.compile(flex_attention)(
        q, k, v, block_mask=kernel.block_mask(seq_len, device=q.device), scale=scale, enable_gqa=True,
        kernel_options=dict(kernel.options),
    )
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.nn.attention.flex_attention import BlockMask

from ...config import AttentionConfig
from ...device import DeviceFacts
from ...errors import BackendError
from .kernel_options import invariant_options
from .rows import BlockRange, Row, visited_blocks
from .settings import KERNEL_BLOCKS, invariant_kv_block, invariant_query_block

FORCE = "FORCE_USE_FLEX_ATTENTION"


@dataclass(frozen=True, slots=True)
class TrainingKernel:
    """What ``flex_attention`` must be given for the bits of the batch-invariant backend."""

    query_block: int
    kv_block: int
    options: Mapping[str, object]
    """``kernel_options``; on CUDA of the forward pass only."""

    def padded(self, seq_len: int) -> int:
        """``seq_len`` up to whole tiles. On CPU a sequence must be padded: torch's kernel rounds ragged ones anew."""
        multiple = max(self.query_block, self.kv_block)
        return -(-seq_len // multiple) * multiple

    def block_mask(
        self,
        seq_len: int,
        *,
        device: torch.device | str,
        causal: bool = True,
        sliding_window: int | None = None,
        mask_mod: Callable[..., torch.Tensor] | None = None,
    ) -> BlockMask:
        """The mask of ``seq_len`` queries over as many keys, one for all sequences and heads.

        :param sliding_window: keys that a query sees, itself included.
        :param mask_mod: flex_attention's ``mask_mod(batch, head, query, key)``, which narrows the rest; it stands for
            the user's own of ``AttentionCall``.
        """
        tiles = -(-seq_len // self.query_block)
        spans = [
            visited_blocks(
                Row(0, 0, tile * self.query_block, self.query_block, seq_len), self.kv_block, causal, sliding_window
            )
            for tile in range(tiles)
        ]
        if mask_mod is not None:
            spans = [BlockRange(span.first, span.end, span.end, span.end) for span in spans]
        blocks = -(-seq_len // self.kv_block)
        column = torch.arange(blocks)
        bounds = torch.tensor([(s.first, s.full, s.tail, min(s.end, blocks)) for s in spans])
        first, full, tail, end = (bound[:, None] for bound in bounds.unbind(1))
        full, tail = full.minimum(end), tail.minimum(end)
        head = full - first
        masked = torch.where(column < head, first + column, tail - head + column).clamp(max=blocks - 1)
        whole = (full + column).clamp(max=blocks - 1)

        def on_device(part: torch.Tensor, *shape: int) -> torch.Tensor:
            return part.to(torch.int32).reshape(1, 1, tiles, *shape).contiguous().to(device)

        return BlockMask.from_kv_blocks(
            on_device(head + end - tail),
            on_device(masked, blocks),
            on_device(tail - full),
            on_device(whole, blocks),
            BLOCK_SIZE=(self.query_block, self.kv_block),
            mask_mod=_mask(causal, sliding_window, mask_mod),
            seq_lengths=(seq_len, seq_len),
        )


def training_kernel(
    *,
    head_size: int,
    dtype: str,
    kernel_block_size: int,
    device_type: str,
    config: AttentionConfig | None = None,
) -> TrainingKernel:
    """The kernel of a backend that was built with these facts and ``batch_invariant``.

    :param kernel_block_size: as the plan has it for the layer (``flex_attn_kv_block_size`` goes before it).
    :param config: the ``flex_attn_*`` settings that the backend was built with.
    :raises BackendError: for a dtype, a device or a kernel block that flex would not serve under batch invariance,
        and for 16-bit dtypes on a CPU with AMX.
    """
    config = config or AttentionConfig()
    _check("dtype", dtype, ("float32", "bfloat16", "float16"))
    _check("device_type", device_type, ("cpu", "cuda"))
    _check("kernel_block_size", kernel_block_size, KERNEL_BLOCKS)
    device = DeviceFacts(platform=device_type, device_type=device_type)
    on_cpu = device_type == "cpu"
    if on_cpu and dtype != "float32" and torch.cpu._is_amx_tile_supported():
        raise BackendError(
            f"dtype {dtype}: on a CPU with AMX a plain pass does not have the bits of the paged cache (seen with torch"
            " 2.11.0 on a Xeon); float32 does, and so does a GPU",
            option="dtype",
            value=dtype,
            expected="float32",
        )
    kernel_block = config.flex_attn_kv_block_size or kernel_block_size
    kv_block = invariant_kv_block(config, kernel_block, on_cpu=on_cpu)
    query_block = invariant_query_block(config, on_cpu=on_cpu)
    element_bytes = torch.tensor([], dtype=getattr(torch, dtype)).element_size()
    options = invariant_options(device, head_size, element_bytes, kernel_block, query_block, config)
    if not on_cpu:
        options = {f"fwd_{name}" if name != FORCE else name: value for name, value in options.items()}
    return TrainingKernel(query_block, kv_block, options)


def _check(option: str, value: object, served: tuple[object, ...]) -> None:
    if value not in served:
        raise BackendError(
            f"{option} {value!r} has no batch-invariant flex kernel; {', '.join(map(str, served))} have",
            option=option,
            value=value,
            expected=list(served),
        )


def soft_cap_modifier(soft_cap: float) -> Callable[..., torch.Tensor]:
    """The ``score_mod`` of a soft cap, in the backend's own arithmetic."""

    def cap(score: torch.Tensor, b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        return soft_cap * torch.tanh(score / soft_cap)

    return cap


def _mask(causal: bool, window: int | None, own: Callable[..., torch.Tensor] | None) -> Callable[..., torch.Tensor]:
    def mask(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        seen = q >= kv if causal else kv >= 0
        if window is not None:
            seen = seen & (q - kv < window)
            if not causal:
                seen = seen & (kv - q < window)
        return seen if own is None else seen & own(b, h, q, kv)

    return mask
