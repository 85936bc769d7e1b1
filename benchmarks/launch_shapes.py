"""Shapes of published hybrid models for random weights, cut where one device's memory asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FALCON_H1_7B: dict[str, Any] = {
    "model_type": "falcon_h1", "hidden_size": 3072, "num_hidden_layers": 44, "num_attention_heads": 12,
    "num_key_value_heads": 2, "head_dim": 128, "intermediate_size": 12288, "vocab_size": 130048,
    "mamba_d_ssm": 3072, "mamba_n_heads": 24, "mamba_d_head": 128, "mamba_d_state": 256, "mamba_n_groups": 1,
    "mamba_d_conv": 4, "mamba_expand": 2, "mamba_chunk_size": 128, "max_position_embeddings": 262144,
    "tie_word_embeddings": False,
}  # fmt: skip
NEMOTRON_3_NANO: dict[str, Any] = {
    "model_type": "nemotron_h", "hidden_size": 2688, "num_attention_heads": 32, "num_key_value_heads": 2,
    "head_dim": 128, "mamba_num_heads": 64, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8,
    "conv_kernel": 4, "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "intermediate_size": 1856, "n_routed_experts": 128, "num_experts_per_tok": 6, "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712, "vocab_size": 131072, "max_position_embeddings": 131072,
    "rescale_prenorm_residual": False,
}  # fmt: skip
QWEN3_NEXT: dict[str, Any] = {
    "model_type": "qwen3_next", "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 16,
    "num_key_value_heads": 2, "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
    "intermediate_size": 5632, "num_experts": 512, "num_experts_per_tok": 10, "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512, "vocab_size": 151936, "max_position_embeddings": 262144,
}  # fmt: skip
QWEN3_NEXT_THIRD: dict[str, Any] = {**QWEN3_NEXT, "num_hidden_layers": 16}
KIMI_LINEAR_12: dict[str, Any] = {
    "model_type": "kimi_linear", "hidden_size": 2304, "num_hidden_layers": 12, "num_attention_heads": 32,
    "num_key_value_heads": 32, "kv_lora_rank": 512, "q_lora_rank": None, "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128, "v_head_dim": 128, "intermediate_size": 9216, "moe_intermediate_size": 1024,
    "num_local_experts": 256, "num_experts_per_tok": 8, "vocab_size": 163840, "max_position_embeddings": 1048576,
    "linear_attn_config": {
        "full_attn_layers": [4, 8, 12], "kda_layers": [1, 2, 3, 5, 6, 7, 9, 10, 11], "head_dim": 128, "num_heads": 32,
        "short_conv_kernel_size": 4,
    },
}  # fmt: skip
FALCON_H1_TINY: dict[str, Any] = {
    **FALCON_H1_7B, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 16,
    "intermediate_size": 128, "vocab_size": 256, "mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16,
    "mamba_d_state": 16,
}  # fmt: skip

SHAPES: Mapping[str, dict[str, Any]] = {
    "falcon-h1-7b": FALCON_H1_7B,
    "nemotron-3-nano": NEMOTRON_3_NANO,
    "qwen3-next-16-layers": QWEN3_NEXT_THIRD,
    "kimi-linear-12-layers": KIMI_LINEAR_12,
    "falcon-h1-tiny": FALCON_H1_TINY,
}
"""By name; the last is for machines without an accelerator."""
