"""Tiny seeded models of every family, for tests that need a real forward pass. Needs transformers (imported inside)."""

from __future__ import annotations

from typing import Any

HIDDEN = 64
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2}
COMMON = {
    "vocab_size": 128,
    "hidden_size": HIDDEN,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "max_position_embeddings": 512,
}
BAMBA_STATE = {
    "mamba_n_heads": 8, "mamba_n_groups": 2, "mamba_d_state": 16, "mamba_d_head": 16, "mamba_d_conv": 4,
    "mamba_expand": 2, "mamba_chunk_size": 8,
}  # fmt: skip
MAMBA1_STATE = {"mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2}
DELTA_STATE = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}  # fmt: skip
SMALL_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LINEAR_FULL = ["linear_attention", "full_attention"] * 2

FIELDS: dict[str, dict[str, Any]] = {
    "nemotron_h": {
        **ATTENTION, "head_dim": 16, "hybrid_override_pattern": "M*-M*E", "intermediate_size": 128,
        "ssm_state_size": 16, "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2, "conv_kernel": 4,
        "chunk_size": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 32, "rescale_prenorm_residual": False,
    },
    "bamba": {
        **ATTENTION, **BAMBA_STATE, "num_hidden_layers": 4, "attn_layer_indices": [1, 3],
        "intermediate_size": 128,
    },
    "granitemoehybrid": {
        **ATTENTION, **BAMBA_STATE, "num_hidden_layers": 4, "layer_types": LINEAR_FULL, "intermediate_size": 64,
        "shared_intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2,
        "position_embedding_type": "rope", "attention_multiplier": 0.25,
    },
    "falcon_h1": {
        **ATTENTION, **BAMBA_STATE, "mamba_d_ssm": 128, "head_dim": 16, "num_hidden_layers": 3,
        "intermediate_size": 128,
    },
    "mamba": {
        "num_hidden_layers": 4, "state_size": 16, "expand": 2, "conv_kernel": 4, "use_mambapy": False,
    },
    "mamba2": {
        "num_hidden_layers": 4, "state_size": 16, "expand": 2, "conv_kernel": 4, "num_heads": 8, "head_dim": 16,
        "n_groups": 2, "chunk_size": 8,
    },
    "falcon_mamba": {"num_hidden_layers": 4, "state_size": 16, "expand": 2, "conv_kernel": 4},
    "zamba": {
        **MAMBA1_STATE, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "n_mamba_heads": 2,
        "num_hidden_layers": 5, "intermediate_size": 64,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid", "linear_attention"],
    },
    "zamba2": {
        "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "n_mamba_heads": 4,
        "mamba_ngroups": 2, "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2, "chunk_size": 8,
        "num_hidden_layers": 5, "intermediate_size": 64, "num_mem_blocks": 1, "use_mem_rope": True,
        "adapter_rank": 8,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid", "linear_attention"],
    },
    "jamba": {
        **ATTENTION, **MAMBA1_STATE, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
        "expert_layer_period": 2, "expert_layer_offset": 1, "intermediate_size": 64, "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "qwen3_next": {
        **ATTENTION, **DELTA_STATE, **SMALL_MOE, "head_dim": 16, "num_hidden_layers": 4,
        "layer_types": LINEAR_FULL, "intermediate_size": 128, "shared_expert_intermediate_size": 32,
    },
    "qwen3_5_text": {
        **ATTENTION, **DELTA_STATE, "head_dim": 16, "num_hidden_layers": 4, "layer_types": LINEAR_FULL,
        "intermediate_size": 128,
    },
    "qwen3_5_moe_text": {
        **ATTENTION, **DELTA_STATE, **SMALL_MOE, "head_dim": 16, "num_hidden_layers": 4,
        "layer_types": LINEAR_FULL, "shared_expert_intermediate_size": 32,
    },
    "olmo_hybrid": {
        **ATTENTION, **DELTA_STATE, "num_hidden_layers": 4, "layer_types": LINEAR_FULL, "intermediate_size": 128,
    },
    "kimi_linear": {
        "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 4, "intermediate_size": 128,
        "kv_lora_rank": 32, "q_lora_rank": None, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
        "v_head_dim": 16, "moe_intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "linear_attn_config": {
            "full_attn_layers": [2, 4], "kda_layers": [1, 3], "head_dim": 16, "num_heads": 4,
            "short_conv_kernel_size": 4,
        },
    },
    "lfm2": {
        **ATTENTION, "num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2, "conv_L_cache": 3,
        "intermediate_size": 128, "block_auto_adjust_ff_dim": False,
    },
    "lfm2_moe": {
        **ATTENTION, **SMALL_MOE, "num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2,
        "conv_L_cache": 3, "intermediate_size": 128, "num_dense_layers": 1,
    },
    "zaya": {
        **ATTENTION, "head_dim": 16, "num_hidden_layers": 4, "num_experts": 4, "num_experts_per_tok": 1,
        "moe_intermediate_size": 32, "router_hidden_size": 16,
    },
    "llama": {**ATTENTION, "head_dim": 16, "num_hidden_layers": 3, "intermediate_size": 128},
    "gemma3_text": {
        **ATTENTION, "head_dim": 16, "num_hidden_layers": 4, "intermediate_size": 128, "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "query_pre_attn_scalar": 16,
    },
    "gemma2": {
        **ATTENTION, "head_dim": 16, "num_hidden_layers": 4, "intermediate_size": 128, "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 5.0,
    },
    "gpt_oss": {
        **ATTENTION, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "head_dim": 16, "num_hidden_layers": 4, "intermediate_size": 32, "num_local_experts": 4,
        "num_experts_per_tok": 2, "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
}  # fmt: skip
"""Per family the fields that differ from COMMON. All attention layers have 4 query heads of width 16 (kimi: MLA)."""

FAMILIES: tuple[str, ...] = tuple(FIELDS)
HYBRID_FAMILIES: tuple[str, ...] = tuple(f for f in FIELDS if f not in ("llama", "gemma3_text", "gemma2", "gpt_oss"))
ATTENTION_FREE: tuple[str, ...] = ("mamba", "mamba2", "falcon_mamba")


def tiny_config(family: str) -> Any:
    """The transformers configuration of a tiny model of ``family``: 3 to 6 layers, 128 tokens of vocabulary."""
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **{**COMMON, **FIELDS[family]})


def tiny_model(family: str, seed: int = 0, dtype: str = "float32") -> Any:
    """A tiny model of ``family`` in evaluation mode, whose tokens depend on every state.

    Convolution kernels and biases come out of transformers' initialisation small or zero, and states are forgotten
    within a few tokens; these parameters are drawn anew, so that a lost state, a lost column or a wrong K or V
    changes logits by far more than rounding.
    """
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=getattr(torch, dtype))  # type: ignore[no-untyped-call]
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ("conv" in name and parameter.dim() >= 2) or name.endswith((".temp", ".sinks")):
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
            elif name.endswith("A_log") and parameter.dim() == 1:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) - 1.5)
    return model.eval()
