"""Tiny transformers models with a DSA indexer, built from their configs with random weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers

# Sizes that differ from each other wherever they can, so that no two axes are equal by accident.
_COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    # Enough heads that no score is exactly 0 because all ReLUs are: eager mode breaks such ties as it likes.
    "index_n_heads": 14,
    "index_head_dim": 16,
    "index_topk": 8,
    "max_position_embeddings": 512,
    "q_lora_rank": 28,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.3,
}
_MLA: dict[str, Any] = {
    "intermediate_size": 56,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "qk_nope_head_dim": 12,
    "mlp_layer_types": ["dense", "sparse"],
}
_GROUPED: dict[str, Any] = {"n_group": 2, "topk_group": 1}

# name -> (config class, model class, overrides, layers that run an indexer, attention implementations)
MODELS: dict[str, tuple[str, str, dict[str, Any], int, tuple[str, ...]]] = {
    "deepseek_v32": ("DeepseekV32Config", "DeepseekV32ForCausalLM", {**_MLA, **_GROUPED}, 2, ("eager", "sdpa")),
    "glm_moe_dsa": (
        "GlmMoeDsaConfig",
        "GlmMoeDsaForCausalLM",
        {
            **_MLA,
            **_GROUPED,
            "num_hidden_layers": 3,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "indexer_types": ["full", "shared", "full"],
        },
        2,
        ("eager", "sdpa"),
    ),
    "axk2": ("AXK2Config", "AXK2ForCausalLM", {**_MLA, **_GROUPED, "gated_norm_rank": 4}, 2, ("eager", "sdpa")),
    "hy_v4": ("HYV4Config", "HYV4ForCausalLM", {**_MLA, **_GROUPED, "indexer_types": ["full", "full"]}, 2, ("eager",)),
    "deepseek_v4": (
        "DeepseekV4Config",
        "DeepseekV4ForCausalLM",
        {
            "num_attention_heads": 4,
            "head_dim": 32,
            "partial_rotary_factor": 0.25,
            "num_hidden_layers": 3,
            "layer_types": [
                "sliding_attention",
                "compressed_sparse_attention",
                "compressed_sparse_attention",
            ],
            "mlp_layer_types": ["moe", "moe", "moe"],
            "hc_mult": 2,
            "hc_sinkhorn_iters": 2,
            "sliding_window": 16,
            "o_groups": 2,
            "o_lora_rank": 14,
            "num_nextn_predict_layers": 0,
        },
        2,
        ("eager",),
    ),
}


def build(name: str, dtype: torch.dtype = torch.float32, attention: str = "eager", **overrides: Any) -> Any:
    """The model ``name`` in evaluation mode, tiny, with random weights that depend on nothing else."""
    config_class, model_class, settings, _, _ = MODELS[name]
    config = getattr(transformers, config_class)(**{**_COMMON, **settings, **overrides}, attn_implementation=attention)
    torch.manual_seed(0)
    return getattr(transformers, model_class)(config).eval().to(dtype)
