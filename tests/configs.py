"""The published configs of the family as dicts, for tests of Config."""

from typing import Any


class _Drop:
    def __repr__(self) -> str:
        return "DROP"  # stands in test ids, which must not change from process to process


DROP: Any = _Drop()

# Spec section 1: what every published config of the family says (the three models share their geometry).
GEOMETRY: dict[str, Any] = {
    "architectures": ["GlmMoeDsaForCausalLM"],
    "model_type": "glm_moe_dsa",
    "dtype": "bfloat16",
    "hidden_size": 6144,
    "vocab_size": 154880,
    "num_hidden_layers": 78,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "q_lora_rank": 2048,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "qk_head_dim": 256,
    "v_head_dim": 256,
    "head_dim": 192,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "intermediate_size": 12288,
    "first_k_dense_replace": 3,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "rms_norm_eps": 1e-5,
    "rope_interleave": True,
    "index_topk": 2048,
    "index_n_heads": 32,
    "index_head_dim": 128,
    "indexer_rope_interleave": True,
    "num_nextn_predict_layers": 1,
    "eos_token_id": [154820, 154827, 154829],
    "pad_token_id": 154820,
    "ep_size": 1,
    "pretraining_tp": 1,
    "initializer_range": 0.02,
    "use_cache": True,
}
FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head", "model.layers.0.self_attn.indexers_proj"],
}
FULL_52 = (0, 1, 2, 6, 10, 14, 18, 22, 26, 30, 34, 38, 42, 46, 50, 54, 58, 62, 66, 70, 74)
INDEXER_TYPES = ["full" if i in FULL_52 else "shared" for i in range(78)]
GLM52: dict[str, Any] = GEOMETRY | {
    "max_position_embeddings": 1048576,
    "rope_parameters": {"rope_theta": 8000000, "rope_type": "default"},
    "index_topk_freq": 4,
    "index_skip_topk_offset": 3,
    "index_topk_pattern": None,
    "indexer_types": INDEXER_TYPES,
    "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 75,
    "index_share_for_mtp_iteration": True,
}
GLM52_FP8 = GLM52 | {"moe_router_dtype": "float32", "quantization_config": FP8}
# Spec section 2: GLM-5 and 5.1 have no sharing keys.
GLM5: dict[str, Any] = GEOMETRY | {
    "max_position_embeddings": 202752,
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
}
# The keys that save_pretrained of transformers 5.23.0 writes, with the values of its default GlmMoeDsaConfig().
SAVED: dict[str, Any] = {
    **{"attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 1},
    **{"architectures": ["GlmMoeDsaForCausalLM"], "dtype": "float32", "first_k_dense_replace": 3, "head_dim": 64},
    **{"hidden_act": "silu", "hidden_size": 6144, "index_head_dim": 128, "index_n_heads": 32, "index_topk": 2048},
    **{"indexer_types": ["full"] * 78, "initializer_range": 0.02, "intermediate_size": 12288, "kv_lora_rank": 512},
    **{"layer_types": ["indexed_attention"] * 78, "max_position_embeddings": 202752, "mlp_bias": False},
    **{"mlp_layer_types": ["dense"] * 3 + ["sparse"] * 75, "model_type": "glm_moe_dsa", "moe_intermediate_size": 2048},
    **{"n_group": 1, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True},
    **{"num_attention_heads": 64, "num_experts_per_tok": 8, "num_hidden_layers": 78, "num_key_value_heads": 64},
    **{"output_router_logits": False, "pad_token_id": None, "q_lora_rank": 2048, "qk_head_dim": 256},
    **{"qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-05, "routed_scaling_factor": 2.5},
    **{"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "tie_word_embeddings": False},
    **{"topk_group": 1, "transformers_version": "5.23.0", "use_cache": True, "v_head_dim": 256, "vocab_size": 154880},
}


def changed(**changes: Any) -> dict[str, Any]:
    """GLM-5.2's config with some keys replaced, or left out where the value is DROP."""
    return {key: value for key, value in (GLM52 | changes).items() if value is not DROP}
