"""K and V into their slots by one Triton kernel: slot mapping, optional rotary, optional quantisation with scales.

Imports Triton: :func:`~makeready.cache.write.write_kv` imports this file where Triton is installed and the tensors
are on a device it compiles for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..early_launch import early_launch

ELEMENTS = 8192
"""Elements of K (and of V) that one program moves. H200, 8192 tokens x 8 heads x 128, bf16: 0.92 of a copy's bandwidth
with 1024, 0.95 with 2048 to 8192, 0.96 with 16384 (benchmarks/LOG.md)."""
FULL_GRID = 256
"""Programs below which a program takes fewer tokens."""


@triton.jit
def _store_rows(
    rows_ptr, cache_ptr, scale, cos_ptr, sin_ptr, token, slot, head, r_t, r_h, c_b, c_t, c_h, cs_t, limit,
    BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROTARY: tl.constexpr,
    LIMIT: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Move rows ``token`` (R,) of heads ``head`` (H,) to ``slot`` (R,); slots of -1 are left out."""
    d = tl.arange(0, DP)
    ok = (slot >= 0)[:, None, None] & (head < HEADS)[None, :, None] & (d < D)[None, None, :]
    from_row = token.to(tl.int64)[:, None, None] * r_t + head[None, :, None] * r_h
    x = tl.load(rows_ptr + from_row + d[None, None, :], mask=ok, other=0.0)
    if ROTARY > 0:  # halves: the first ROTARY / 2 numbers of a head turn with the next ROTARY / 2
        half: tl.constexpr = ROTARY // 2
        turned = ok & (d < ROTARY)[None, None, :]
        partner = tl.where(d < half, d + half, d - half)
        y = tl.load(rows_ptr + from_row + partner[None, None, :], mask=turned, other=0.0).to(tl.float32)
        at = token.to(tl.int64)[:, None, None] * cs_t + (d % half)[None, None, :]
        cos = tl.load(cos_ptr + at, mask=turned, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + at, mask=turned, other=0.0).to(tl.float32)
        sign = tl.where(d < half, -1.0, 1.0)[None, None, :]
        x = (x.to(tl.float32) * cos + sign * y * sin).to(x.dtype)
    if SCALED:
        x = x.to(tl.float32) / scale
    if LIMIT:  # NaN stays NaN, as torch.clamp leaves it
        x = tl.maximum(x.to(tl.float32), -limit, propagate_nan=tl.PropagateNan.ALL)
        x = tl.minimum(x, limit, propagate_nan=tl.PropagateNan.ALL)
    block = (slot // BLOCK_SIZE)[:, None, None]
    to = block * c_b + (slot % BLOCK_SIZE)[:, None, None] * c_t + head[None, :, None] * c_h + d[None, None, :]
    tl.store(cache_ptr + to, x.to(cache_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["num_tokens"])
def write_kernel(
    key_ptr, value_ptr, key_cache_ptr, value_cache_ptr, slot_ptr, k_scale, v_scale, cos_ptr, sin_ptr,
    num_tokens, k_t, k_h, v_t, v_h, kc_b, kc_t, kc_h, vc_b, vc_t, vc_h, cs_t, limit,
    BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr, HEADS_P: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    DV: tl.constexpr, DVP: tl.constexpr, ROWS: tl.constexpr, ROTARY: tl.constexpr,
    LIMIT: tl.constexpr, SCALED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A program moves ROWS tokens of HEADS_P heads."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1) * HEADS_P + tl.arange(0, HEADS_P)
    slot = tl.load(slot_ptr + token, mask=token < num_tokens, other=-1).to(tl.int64)
    _store_rows(key_ptr, key_cache_ptr, k_scale, cos_ptr, sin_ptr, token, slot, head, k_t, k_h, kc_b, kc_t, kc_h,
                cs_t, limit, BLOCK_SIZE, HEADS, D, DP, ROTARY, LIMIT, SCALED)  # fmt: skip
    _store_rows(value_ptr, value_cache_ptr, v_scale, cos_ptr, sin_ptr, token, slot, head, v_t, v_h, vc_b, vc_t,
                vc_h, cs_t, limit, BLOCK_SIZE, HEADS, DV, DVP, 0, LIMIT, SCALED)  # fmt: skip


def write_rows(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    scales: tuple[float, float] | None = None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    elements: int = ELEMENTS,
) -> None:
    """What :func:`~makeready.cache.write.write_kv` says; shapes are checked there. Never waits for the device.

    :param elements: of K, and of V, that one program moves at most.
    """
    num_tokens, heads, width = key.shape
    if num_tokens == 0:
        return
    width_v = value.shape[-1]
    key, value = (rows if rows.stride(-1) == 1 else rows.contiguous() for rows in (key, value))
    padded, padded_v = triton.next_power_of_2(width), triton.next_power_of_2(width_v)
    heads_padded = min(triton.next_power_of_2(heads), max(1, elements // padded))
    rows_of_program = max(1, min(elements // (padded * heads_padded), triton.next_power_of_2(num_tokens) // FULL_GRID))
    cos, sin = rotary if rotary is not None else (None, None)
    if cos is not None and sin is not None and not (cos.stride() == sin.stride() and cos.stride(-1) == 1):
        cos, sin = cos.contiguous(), sin.contiguous()
    slot_mapping = slot_mapping.contiguous()
    k_scale, v_scale = map(float, scales if scales is not None else (1.0, 1.0))
    limit = torch.finfo(key_cache.dtype).max if key_cache.dtype.is_floating_point else 0.0
    narrow = key_cache.dtype.is_floating_point and limit < torch.finfo(key.dtype).max
    write_kernel[(triton.cdiv(num_tokens, rows_of_program), triton.cdiv(heads, heads_padded))](
        key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale, cos, sin,
        num_tokens, key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        *key_cache.stride()[:3], *value_cache.stride()[:3], cos.stride(0) if cos is not None else 0, limit,
        BLOCK_SIZE=key_cache.shape[1], HEADS=heads, HEADS_P=heads_padded, D=width, DP=padded, DV=width_v, DVP=padded_v,
        ROWS=rows_of_program, ROTARY=0 if cos is None else 2 * cos.shape[-1], LIMIT=narrow, SCALED=scales is not None,
        num_warps=4, **early_launch(key.device),
    )  # fmt: skip
