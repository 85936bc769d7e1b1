"""A flash library in slow PyTorch, for tests of what our providers pass to such libraries."""

from __future__ import annotations

import torch


def paged_attention(q, k, v, query_start, seq_lens, table, *, scale, causal, window=(-1, -1), softcap=0.0, sinks=None):
    """Packed queries over pages, in the conventions of FlashAttention: windows count the keys beside a query's own."""
    out = torch.empty(q.shape[0], q.shape[1], v.shape[-1], dtype=q.dtype, device=q.device)
    before, after = window[0], 0 if causal else window[1]
    for row in range(len(seq_lens)):
        a, b, n = int(query_start[row]), int(query_start[row + 1]), int(seq_lens[row])
        pages = table[row].long()
        keys, values = (
            x[pages].flatten(0, 1)[:n].float().repeat_interleave(q.shape[1] // x.shape[2], 1) for x in (k, v)
        )
        scores = torch.einsum("qhd,khd->hqk", q[a:b].float(), keys) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        distance = torch.arange(n)[None] - (torch.arange(b - a)[:, None] + n - (b - a))
        seen = torch.ones_like(distance, dtype=torch.bool)
        if before >= 0:
            seen &= distance >= -before
        if causal or after >= 0:
            seen &= distance <= after
        scores = scores.masked_fill(~seen, -torch.inf)
        if sinks is not None:
            sink = sinks.float()[:, None, None].expand(-1, b - a, 1)
            weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        out[a:b] = torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)
    return out


def flash_attention_3(
    q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
    cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None,
    max_seqlen_q=None, rotary_seqlens=None, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None,
    causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True,
    scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False,
):  # fmt: skip
    """The signature of ``flash_attn_with_kvcache`` in the hopper folder."""
    assert max_seqlen_q == int(cu_seqlens_q.diff().max())
    assert page_table.stride(-1) == 1
    return paged_attention(
        q, k_cache, v_cache, cu_seqlens_q, cache_seqlens, page_table,
        scale=softmax_scale, causal=causal, window=window_size, softcap=softcap,
    )  # fmt: skip


def flash_attention_4(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None,
    seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False,
    window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    score_mod=None, return_lse=False,
):  # fmt: skip
    """The signature of ``flash_attn_varlen_func`` in ``flash_attn.cute``; it answers with a pair."""
    assert max_seqlen_k >= int(seqused_k.max())
    assert max_seqlen_q == int(cu_seqlens_q.diff().max())
    window = tuple(-1 if side is None else side for side in window_size)
    out = paged_attention(
        q, k, v, cu_seqlens_q, seqused_k, page_table,
        scale=softmax_scale, causal=causal, window=window, softcap=softcap, sinks=learnable_sink,
    )  # fmt: skip
    return out, None


def xpu_kernels(
    q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, cu_seqlens_k=None, seqused_k=None, q_v=None, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=None, softcap=0.0, alibi_slopes=None, deterministic=False,
    return_attn_probs=False, block_table=None, return_softmax_lse=False, out=None, scheduler_metadata=None,
    q_descale=None, k_descale=None, v_descale=None, num_splits=0, fa_version=2, s_aux=None, num_splits_kv=None,
):  # fmt: skip
    """The signature of vllm-xpu-kernels."""
    assert max_seqlen_k >= int(seqused_k.max())
    return paged_attention(
        q, k, v, cu_seqlens_q, seqused_k, block_table,
        scale=softmax_scale, causal=causal, window=window_size or (-1, -1), softcap=softcap, sinks=s_aux,
    )  # fmt: skip


def aten_flash_attention(
    q, k, v, query_start, key_start, max_q, max_k, dropout, causal, debug, *, scale=None, window_size_left=None,
    window_size_right=None, seqused_k=None, alibi_slopes=None, block_table=None, num_splits=None,
):  # fmt: skip
    """A kernel for ``aten::_flash_attention_forward``, which torch's varlen attention calls."""
    out = paged_attention(
        q, k, v, query_start, seqused_k, block_table,
        scale=scale, causal=causal, window=(window_size_left, window_size_right),
    )  # fmt: skip
    counts = torch.zeros(2, dtype=torch.uint64)
    return out, torch.zeros(q.shape[1], q.shape[0]), counts, torch.zeros((), dtype=torch.uint64), torch.empty(0)
